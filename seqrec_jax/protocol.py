"""Evaluation protocols: how a model is judged. They never change how it is trained."""

import dataclasses

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Candidates, hiding, and the validation metric that selects the checkpoint."""

    name: str
    candidates: str  # all | sampled
    hide_history: str  # yes | no
    metric: str  # "": none, the last checkpoint counts
    text: str = ""  # where it is no ranking of leave-one-out targets: what is judged instead

    def line(self) -> str:
        """One line for people, printed with every table."""
        if self.text:
            return self.text
        hidden = "history hidden" if self.hide_history == "yes" else "history not hidden"
        pool = f"all items, {hidden}" if self.candidates == "all" else "the target and sampled negatives"
        return f"protocol {self.name}: {pool}; leave-one-out; checkpoint chosen on validation {self.metric}"


PROTOCOLS = {
    "A": Protocol("A", "all", "yes", "ndcg@20"),
    "B": Protocol("B", "all", "no", "mrr@10"),
    "C": Protocol("C", "sampled", "no", "mrr"),  # 99 uniform negatives
    "D": Protocol("D", "all", "yes", "ndcg@10"),
}
# What is no ranking of leave-one-out targets.
UNJUDGED = Protocol("none", "all", "no", "", "pretraining: users are described, not judged; the last checkpoint counts")

TASKS = {  # of system=downstream, on users apart from those trained on
    "profile": Protocol(
        "profile", "all", "no", "accuracy", "profile: held-out users' label; checkpoint chosen on validation accuracy"
    ),
    "cold_start": Protocol(
        "cold_start", "all", "no", "mrr@10",
        "cold start: every target of held-out users among all target items; checkpoint chosen on validation mrr@10",
    ),
}  # fmt: skip


def ranks_items(config: ConfigDict) -> bool:
    """Whether the run's user states rank the items of its data."""
    return config.system != "clue" and config.task not in TASKS


def protocol_of(config: ConfigDict) -> Protocol:
    """The protocol of `config.eval`; `custom` reads the single settings."""
    settings = config.eval
    if not ranks_items(config):
        return TASKS.get(config.task, UNJUDGED)
    if settings.protocol == "custom":
        return Protocol("custom", settings.candidates, settings.hide_history, settings.metric)
    return PROTOCOLS[settings.protocol]
