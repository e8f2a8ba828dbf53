"""The error that is the user's to mend."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What was wrong, where, and what to do about it. The command line prints it and exits with code 2."""


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among `known`: it lists them and offers the nearest spelling."""
    spelled = {word.lower(): word for word in known}
    close = difflib.get_close_matches(name.lower(), spelled, n=1)
    hint = f" Did you mean '{spelled[close[0]]}'?" if close else ""
    return UserError(f"{what} '{name}' is not known.{hint} Known: {', '.join(spelled.values())}")


class RunFailed(Exception):
    """A run that cannot go on, through no fault of its configuration. The command line prints it and exits with 1."""
