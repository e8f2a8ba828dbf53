"""From seconds to bench.json and its table. Ratios only where nothing disturbed the run."""

from statistics import median

from benchmarks.machine import GEMM

BUSY_SHARE = 0.15  # of the usable cores, used by others
BUSY_SPREAD = 1.3  # median / minimum of one figure
UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6}  # the last word of a figure's name
RATIOS = {  # a row: (the row it is compared with, the name in bench.json)
    "train_step.torch_real_ms": ("train_step.ours_ms", "torch_real_ratio"),
    "train_step.torch_packed_ms": ("train_step.ours_ms", "torch_packed_ratio"),
    "train_step.torch_all_ms": ("train_step.ours_ms", "torch_all_ratio"),
    "prefix.torch_target_us": ("prefix.ours_target_us", "target_ratio"),
    "loss.torch_ms": ("loss.ours_ms", "torch_ratio"),
    "contrastive_step.ours_ms": ("train_step.ours_ms", "plain_ratio"),
    "augmentation.two_views_ms": ("contrastive_step.ours_ms", "contrastive_step_share"),
    "duorec.torch_target_us": ("duorec.ours_target_us", "target_ratio"),
    "s3rec.torch_sequence_us": ("s3rec.ours_sequence_us", "sequence_ratio"),
    "s3rec.torch_masked_item_us": ("s3rec.ours_masked_item_us", "masked_item_ratio"),
    "s3rec.torch_epoch_s": ("s3rec.ours_epoch_s", "epoch_ratio"),
    "clue.two_views_ms": ("clue.causal_pass_ms", "causal_pass_ratio"),
    "evaluate.torch_ms": ("evaluate.ours_ms", "torch_ratio"),
}
RATES = (  # section, time of a unit, its name in bench.json
    ("duorec", "target_us", "targets_per_s"),
    ("s3rec", "sequence_us", "sequences_per_s"),
    ("s3rec", "masked_item_us", "masked_items_per_s"),
)


def summary(seconds: dict[str, list[float]], facts: dict[str, float], others: list[float], machine: dict) -> dict:
    """bench.json: medians and minima by section, what follows from them, and the ratios if the machine was quiet.

    `seconds`: by "section.name_unit", one value a round. `facts`: `targets` a step, `users` evaluated, `step_flops`,
    `loss_flops`, `step_temp_mib`. `others`: shares of the cores that others used.
    """
    reasons = busy_reasons(seconds, others)
    result = {"busy": bool(reasons), "reasons": reasons, "machine": machine | {"others_share": others}}
    for key, values in seconds.items():
        section, name = key.split(".")
        scale = UNITS[name.rpartition("_")[2]]
        part = result.setdefault(section, {"minima": {}})
        part[name], part["minima"][name] = scale * median(values), scale * min(values)
    limit = 2 * GEMM**3 / median(seconds["gemm.ours_ms"]) / 1e9  # in the same rounds as all else
    step, loss, evaluate = result["train_step"], result["loss"], result["evaluate"]
    step |= {"targets": facts["targets"], "gemm_gflops": limit}
    step["useful_gflops"] = facts["step_flops"] / step["ours_ms"] / 1e6
    loss["useful_gflops"] = facts["loss_flops"] / loss["ours_ms"] / 1e6
    evaluate |= {f"{side}_users_per_s": 1e3 * facts["users"] / evaluate[f"{side}_ms"] for side in ("ours", "torch")}
    for section, unit, name in RATES:
        result[section] |= {f"{side}_{name}": 1e6 / result[section][f"{side}_{unit}"] for side in ("ours", "torch")}
    result["memory"] = {"step_temp_mib": facts["step_temp_mib"]}
    if not reasons:
        step["useful_share"], loss["useful_share"] = step["useful_gflops"] / limit, loss["useful_gflops"] / limit
        for key, (reference, name) in RATIOS.items():
            result[key.split(".")[0]][name] = median(seconds[key]) / median(seconds[reference])
    return result


def busy_reasons(seconds: dict[str, list[float]], others: list[float]) -> list[str]:
    """Why no ratio may be made of these figures; empty on a quiet machine."""
    reasons = [f"others used {max(others):.0%} of the cores"] if max(others) > BUSY_SHARE else []
    spread = {key: median(values) / min(values) for key, values in seconds.items()}
    worst = max(spread, key=spread.get)
    if spread[worst] > BUSY_SPREAD:
        reasons.append(f"{worst}: the median is {spread[worst]:.2f} times the minimum")
    return reasons


def table(result: dict) -> str:
    """One line a figure: median, minimum and, on a quiet machine, how many times the figure it is compared with."""
    machine, step, loss = result["machine"], result["train_step"], result["loss"]
    lines = [f"{machine['processor']}, {machine['usable_cores']} cores, jax {machine['jax']}, torch {machine['torch']}"]
    lines += [machine["data"], "", f"{'':<32}{'median':>12}{'minimum':>12}"]
    for section, part in result.items():
        for name, least in (part.get("minima", {}) if isinstance(part, dict) else {}).items():
            words, _, unit = name.rpartition("_")
            line = f"{f'{section} {words}':<32}{part[name]:>9.2f} {unit:<2}{least:>9.2f} {unit:<2}"
            reference, field = RATIOS.get(f"{section}.{name}", ("", ""))
            if field in part:
                line += f"   {part[field]:.3g} x {reference.replace('.', ' ').rpartition('_')[0]}"
            lines.append(line)
    users = {side: result["evaluate"][f"{side}_users_per_s"] for side in ("ours", "torch")}
    lines += [
        "",
        f"a train step: {step['targets']:,.0f} targets, {result['memory']['step_temp_mib']:.0f} MiB of temporaries",
        f"evaluation: {users['ours']:,.0f} users/s, torch {users['torch']:,.0f}",
        *(_rates(section, name, result[section]) for section, _, name in RATES),
        f"useful GFLOP/s: step {step['useful_gflops']:.0f}, loss {loss['useful_gflops']:.0f}, "
        f"of {step['gemm_gflops']:.0f} (float32 product of {GEMM}^3)",
    ]
    if result["busy"]:
        lines.append(f"machine busy: no ratios ({'; '.join(result['reasons'])})")
    else:
        lines.append(f"useful share of that limit: step {step['useful_share']:.0%}, loss {loss['useful_share']:.0%}")
    return "\n".join(lines)


def _rates(section, name, part) -> str:
    return (
        f"{section}: {part[f'ours_{name}']:,.0f} {name.removesuffix('_per_s').replace('_', ' ')}/s, "
        f"torch {part[f'torch_{name}']:,.0f}"
    )
