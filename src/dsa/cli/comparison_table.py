"""The comparison as a table of at most 80 columns."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsa.eval.evaluation import Evaluation
from dsa.eval.reading import Reading

WIDTH = 80
NONE = "-"


def show(evaluation: Evaluation, console: Console) -> None:
    """Prints what was read, the table, what it leaves out, and the continuation."""
    width = min(WIDTH, console.width)
    console.print()
    console.print(
        f"[bold]{escape(evaluation.model)}[/] reads {evaluation.prompt_tokens:,} tokens of "
        f"{escape(evaluation.document)}, then writes {evaluation.new_tokens}; perplexity over the "
        f"{evaluation.dense.evaluated:,} tokens after position {evaluation.start:,}.",
        width=width,
    )
    console.print(comparison(evaluation), width=width)
    for remark in remarks(evaluation):
        console.print(remark, width=width, markup=False)
    if evaluation.new_tokens:
        console.print()
        console.print("[bold]Continuation with DSA:[/]", width=width)
        console.print(printable(evaluation.texts["dsa"]), width=width, markup=False)
        if evaluation.texts["dense"] != evaluation.texts["dsa"]:
            console.print("[bold]with dense attention:[/]", width=width)
            console.print(printable(evaluation.texts["dense"]), width=width, markup=False)


def comparison(evaluation: Evaluation) -> Table:
    """Dense attention, DSA and the window, side by side."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("")
    for heading in ("dense", f"DSA, K = {_budgets(evaluation)}", "4 sinks + window"):
        table.add_column(heading, justify="right")
    readings = (evaluation.dense, evaluation.dsa, evaluation.window)
    dense = evaluation.dense.perplexity
    table.add_row("perplexity", *(f"{each.perplexity:.3f}" for each in readings))
    table.add_row("  ratio to dense", *(f"{each.perplexity / dense:.4f}" for each in readings))
    table.add_row("attention mass kept", "1.000", _share(evaluation, "dsa"), _share(evaluation, "window"))
    table.add_row("  of the oracle's", NONE, _of_oracle(evaluation, "dsa"), _of_oracle(evaluation, "window"))
    read = [evaluation.tokens_read(name) for name in ("dense", "dsa", "window")]
    table.add_row("tokens read per query, mean", *(f"{mean:,.0f}" for mean, _ in read))
    table.add_row("  most", *(f"{most:,}" for _, most in read))
    if evaluation.layers_of("dense"):
        everywhere = f"{evaluation.tokens_read_everywhere():,.0f}"
        table.add_row("  mean, dense layers included", f"{read[0][0]:,.0f}", everywhere, everywhere)
    table.add_row("prefill, seconds", *(f"{each.prefill_s:.1f}" for each in readings))
    table.add_row("decode, tokens/s", *(_decode(each) for each in readings))
    table.add_row("peak memory, MB", *(_memory(each) for each in readings))
    return table


def remarks(evaluation: Evaluation) -> list[str]:
    """What the figures do not say by themselves."""
    said = []
    oracle = evaluation.mass("oracle")
    if oracle is not None:
        said.append(f"The oracle, the best K tokens for every query and layer, keeps {oracle:.3f} of the mass.")
    measured, dense = len(evaluation.layers), evaluation.layers_of("dense")
    if dense:
        said.append(f"Mass and tokens read are over {measured} sparse layers; {_named(dense)} left dense on purpose.")
    if sliding := evaluation.layers_of("sliding"):
        said.append(f"{_named(sliding).capitalize()} left with the model's own sliding window, and not counted.")
    if other := evaluation.layers_of("other"):
        said.append(f"{_named(other).capitalize()} without attention over earlier tokens, and not counted.")
    if shared := evaluation.layers_of("shared"):
        said.append(
            f"{_named(shared).capitalize()} reading what an earlier layer selected; their mass is not measured."
        )
    if evaluation.born_with_dsa:
        said.append(
            "The model was born with DSA: dense and window are the same modules, reading other rows of its latents. "
            "`dsa bench e2e` times it against transformers' own path."
        )
    if not evaluation.report.trained:
        said.append(
            "The indexers are UNTRAINED: what DSA selects here is arbitrary. Train them with `dsa train`, then "
            "pass --indexers."
        )
    if evaluation.prompt_tokens <= evaluation.budgets()[0]:
        said.append(
            f"No query sees more than K = {_budgets(evaluation)} tokens, so nothing is left out: DSA is dense here."
        )
    if evaluation.extrapolated:
        said.append(f"{evaluation.extrapolated:,} positions lie beyond those that the model was trained on.")
    environment = evaluation.environment
    said.append(
        f"Peak memory over everything: {evaluation.peak_rss_mb:,.0f} MB. {environment['machine']}, "
        f"{environment['threads']} thread(s), torch {environment['torch']}, {evaluation.seconds:.0f} s in all."
    )
    return said


def printable(text: str) -> str:
    """A model's text without control characters, which would reach the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text.strip())


def _budgets(evaluation: Evaluation) -> str:
    budgets = evaluation.budgets()
    return f"{budgets[0]:,}" if len(budgets) == 1 else f"{budgets[0]:,} to {budgets[-1]:,}"


def _share(evaluation: Evaluation, selection: str) -> str:
    share = evaluation.mass(selection)
    return NONE if share is None else f"{share:.3f}"


def _of_oracle(evaluation: Evaluation, selection: str) -> str:
    share, oracle = evaluation.mass(selection), evaluation.mass("oracle")
    return NONE if share is None or not oracle else f"{share / oracle:.3f}"


def _decode(reading: Reading) -> str:
    return NONE if reading.decode_tokens_per_s is None else f"{reading.decode_tokens_per_s:.1f}"


def _memory(reading: Reading) -> str:
    return NONE if reading.peak_rss_mb is None else f"{reading.peak_rss_mb:,.0f}"


def _named(layers: list[int]) -> str:
    numbers = ", ".join(str(layer) for layer in layers)
    return f"layer {numbers} is" if len(layers) == 1 else f"layers {numbers} are"
