"""Tables and plots of a finished run."""

from pathlib import Path

from seqrec_jax.workdir import read_lines

COLUMNS = ("hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr@10", "mrr")


def table(results: dict) -> str:
    """The test (and validation) metrics with the baselines beside them, under the protocol line."""
    data = results["dataset"]
    rows = [(f"{results['system']} (test)", results["test"]), (f"{results['system']} (valid)", results["valid"])]
    rows += [(f"{name} (test)", baseline["test"]) for name, baseline in results["baselines"].items()]
    width = max(len(name) for name, _ in rows)
    lines = [
        "",
        results["protocol_line"],
        f"data {data['name']} {data['hash']}: {data['users']:,} users, {data['items']:,} items, "
        f"{data['actions']:,} actions; loss {results['loss']}, targets {results['targets']}, seed {results['seed']}, "
        f"{results['device']}",
        "",
        " " * width + "".join(f"{column:>9}" for column in COLUMNS),
    ]
    lines += [f"{name:<{width}}" + "".join(f"{metrics[column]:9.4f}" for column in COLUMNS) for name, metrics in rows]
    if "steps" in results:
        lines.append(f"\n{results['steps']:,} steps, {results['train_seconds']:.1f} s of training")
    return "\n".join(lines)


def plots(workdir: Path, results: dict) -> None:
    """plots/loss.png and plots/validation.png, each run that was trained in one curve; plots/test.png, the bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = workdir / "plots"
    folder.mkdir(exist_ok=True)
    runs = {results["system"]: read_lines(workdir / "metrics.jsonl")}
    runs |= {name: read_lines(workdir / "baselines" / name / "metrics.jsonl") for name in results["baselines"]}
    metric = results["metric"]
    for kind, value, title in (("train", "next_item", "next-item loss"), ("valid", metric, f"validation {metric}")):
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for name, lines in runs.items():
            points = [(line["step"], line[value]) for line in lines if line["kind"] == kind]
            if points:
                axes.plot(*zip(*points, strict=True), label=name)
        axes.set(xlabel="step", ylabel=title, title=f"{title}, {results['dataset']['name']}")
        if axes.lines:
            axes.legend()
        figure.savefig(folder / ("loss.png" if kind == "train" else "validation.png"), dpi=120)
        plt.close(figure)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    scores = {results["system"]: results["test"]} | {n: b["test"] for n, b in results["baselines"].items()}
    for index, (name, metrics) in enumerate(scores.items()):
        places = [place + index * 0.8 / len(scores) for place in range(len(COLUMNS))]
        axes.bar(places, [metrics[column] for column in COLUMNS], 0.8 / len(scores), align="edge", label=name)
    axes.set_xticks([place + 0.4 for place in range(len(COLUMNS))], COLUMNS)
    axes.set(title=f"test, {results['dataset']['name']}, protocol {results['protocol']}")
    axes.legend()
    figure.savefig(folder / "test.png", dpi=120)
    plt.close(figure)
