"""The `retool` command. Each subcommand is a thin wrapper: parse, call the loop, print.

Bad input ends with one clear line and exit code 2, a failure of ours with exit code 1, never a traceback
(unless RETOOL_DEBUG is set).
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from retool import __version__
from retool.console import console, errors
from retool.errors import UserError
from sandbox.arguments import MAX_REQUEST
from sandbox.loops import keep_standard_streams
from sandbox.types import ConfinementUnavailable, Limits, SandboxError

app = typer.Typer(
    name="retool",
    help="Train language models to reason with a code interpreter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
sandbox_app = typer.Typer(
    help="The code interpreter: run code in it, see what this machine can give.", no_args_is_help=True
)
data_app = typer.Typer(help="Cold-start data: code-augmented traces, executed and verified.", no_args_is_help=True)
app.add_typer(sandbox_app, name="sandbox")
app.add_typer(data_app, name="data")

MOST_S, MOST_MIB = 86_400, 1_048_576
"""What the sandbox's HTTP API takes at most, too."""
RecipeArg = Annotated[Path, typer.Argument(help="Recipe file, e.g. recipes/demo.yaml", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Dotted overrides, e.g. objective=ppo_rlhf learner.lr=1e-6 out=runs/mine", show_default=False),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the recipe's folder.")]


@app.command()
def demo(
    recipe: Annotated[Path, typer.Option(help="Recipe of the demo.")] = Path("recipes/demo.yaml"),
    overrides: Overrides = None,
) -> None:
    """The main job: cold-start traces, SFT, RL with the live sandbox, evaluation, report."""
    from retool.demo import run_demo
    from retool.recipe import load_recipe

    run_demo(load_recipe(recipe, overrides or []))


@app.command()
def train(
    recipe: RecipeArg,
    overrides: Overrides = None,
    resume: Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe, estimate memory and time, and stop.")
    ] = False,
) -> None:
    """Multi-turn RL with the live sandbox.

    Example: retool train recipes/tiny.yaml objective=ppo_rlhf out=runs/ppo
    """
    from retool.recipe import dump_recipe, load_recipe

    resolved = load_recipe(recipe, overrides or [])
    if dry_run:
        from retool.estimate import print_estimate

        print(dump_recipe(resolved), end="", flush=True)
        print_estimate(resolved)
        return
    from retool.console import bar, metrics_line
    from retool.objectives.validate import validate
    from retool.train import train as run

    for warning in validate(resolved):
        errors.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)

    def pretrained(rollout: int, metrics: dict[str, float]) -> None:
        if "held_out/explained_variance" in metrics:
            found = metrics["held_out/explained_variance"]
            console.print(f"value pretraining, rollout {rollout}: held-out explained variance {found:.3f}")

    with bar("RL", resolved.steps) as progress:
        result = asyncio.run(
            run(
                resolved,
                resume=resume,
                on_step=lambda s, m: progress.update(s + 1, metrics_line(m)),
                on_pretrain=pretrained,
            )
        )
    for done, card in result.evaluations.items():
        console.print(f"after {done} steps: accuracy {card['accuracy']:.3f} on {card['problems']} held-out problems")
    console.print(f"model: {result.folder.model}\nreport: retool view {result.folder.path}", markup=False)


@app.command()
def sft(recipe: RecipeArg, overrides: Overrides = None, resume: Resume = False) -> None:
    """Supervised fine-tuning on traces (see `retool data generate`)."""
    from retool.console import bar, metrics_line
    from retool.recipe import load_recipe
    from retool.sft import sft as run

    resolved = load_recipe(recipe, overrides or [])
    with bar("SFT", resolved.sft.steps if resolved.sft else 1) as progress:
        result = run(resolved, resume=resume, on_step=lambda s, m: progress.update(s + 1, metrics_line(m)))
    if result.held_out is not None:
        console.print(f"held-out accuracy of the reward model: {result.held_out:.3f}")
    console.print(f"model: {result.folder.model}", markup=False)


@app.command("eval")
def eval_(
    model: Annotated[str, typer.Argument(help="Model folder or hub name; `-` for the recipe's own.")],
    problems: Annotated[Path, typer.Argument(help="A recipe (its eval.problems), or a .jsonl/.parquet of problems.")],
    overrides: Overrides = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe for protocol, sandbox, reward and sampling.")] = None,
    k: Annotated[int, typer.Option(min=1, help="Samples a problem.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Evaluate only so many problems.")] = None,
    no_tool: Annotated[bool, typer.Option("--no-tool", help="Ban the string that opens a call.")] = False,
    fork_temperature: Annotated[
        float | None, typer.Option(min=0, help="Temperature at tokens of high entropy (default: the recipe's).")
    ] = None,
    rest_temperature: Annotated[float | None, typer.Option(min=0, help="Temperature at all other tokens.")] = None,
    fork_entropy: Annotated[float | None, typer.Option(min=0, help="Nats that make a fork; default 0.672.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write figures and trajectories to this JSON file.")] = None,
    show: Annotated[int, typer.Option(min=0, help="Print so many whole trajectories.")] = 0,
) -> None:
    """Evaluate a model on held-out problems, with the tool or without it."""
    from retool.eval_command import run_eval

    probe = {"fork_temperature": fork_temperature, "rest_temperature": rest_temperature, "fork_entropy": fork_entropy}
    more = [f"eval.{key}={value}" for key, value in probe.items() if value is not None]
    run_eval(
        model,
        problems,
        [*(overrides or []), *more],
        recipe=recipe,
        k=k,
        limit=limit,
        tool=not no_tool,
        out=out,
        show=show,
    )


@app.command()
def compare(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    objectives: Annotated[str, typer.Option(help="Names of presets, with commas; `all` takes every one.")],
    steps: Annotated[str | None, typer.Option(help="Steps of the run, from 0, with commas.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for page, JSON and plot; default RUN/compare.")] = None,
) -> None:
    """Several objectives on the same stored rollouts: gradients, tokens that count, what is clipped.

    Example: retool compare runs/mine --objectives grpo,dapo,vapo
    """
    from retool.compare_command import run_compare
    from retool.objectives import PRESETS

    names = list(PRESETS) if objectives.strip() == "all" else [n.strip() for n in objectives.split(",") if n.strip()]
    try:
        chosen = None if steps is None else [int(s) for s in steps.split(",")]
    except ValueError:
        raise UserError(f"--steps {steps!r}: write numbers with commas, e.g. 40,41") from None
    if not names:
        raise UserError("--objectives names none; `retool objectives` lists them")
    run_compare(run, names, chosen, out)


@app.command()
def view(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    export: Annotated[Path | None, typer.Option(help="Where to write the page; default RUN/report.html.")] = None,
) -> None:
    """One offline HTML page of a run: curves, tool use, coloured traces."""
    from retool.viewer.run_page import write_run_page

    console.print(f"wrote {write_run_page(run, export or run / 'report.html')}", markup=False)


@app.command()
def objectives(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """The presets: every algorithm that a recipe can name."""
    from retool.explain import print_objectives

    print_objectives(as_json)


@app.command()
def explain(key: Annotated[str, typer.Argument(help="Recipe key or preset, e.g. rollout.group_size, dapo")]) -> None:
    """What a recipe key means, its type and its default; or what a preset is."""
    from retool.explain import print_key

    print_key(key)


@app.command("check-template")
def check_template(
    model: Annotated[str, typer.Argument(help="Folder with tokenizer files, or hub name; no weights are loaded.")],
    template: Annotated[Path | None, typer.Option(help="Check this Jinja file instead of the model's own.")] = None,
    protocol: Annotated[str | None, typer.Option(help="Exit code for this protocol.name alone.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Does a chat template keep the exact prefix over turns? Exit code 0 when it does, 1 when not."""
    from retool.template_command import run_check

    raise typer.Exit(run_check(model, template, protocol, as_json))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """What this machine can do for retool, and the command that mends what it cannot. Exit code 1 when something that
    every run needs is wrong; what only a feature lacks is listed."""
    from retool.doctor import print_doctor

    raise typer.Exit(print_doctor(as_json))


@sandbox_app.command("run")
def sandbox_run(
    code: Annotated[str, typer.Argument(help="Python code, or `-` to read it from standard input.")],
    profile: Annotated[
        str, typer.Option(help="py-bare, py-math (numpy and sympy are warm), py-data, or auto.")
    ] = "py-math",
    wall: Annotated[float, typer.Option(min=0.01, max=MOST_S, help="Seconds.")] = 5.0,
    memory: Annotated[int, typer.Option(min=16, max=MOST_MIB, help="MiB.")] = 512,
) -> None:
    """Run code in the sandbox. Exit code 0 when it ended well, 1 otherwise."""
    from retool.sandbox_command import run_code

    raise typer.Exit(run_code(_standard_input() if code == "-" else code, profile, wall, memory))


def _standard_input() -> str:
    """All of it, without the mark that some editors put at a file's beginning."""
    if sys.stdin is None:
        raise UserError("standard input is closed: pipe the code in, or give it as an argument")
    data = sys.stdin.buffer.read(MAX_REQUEST + 1)  # it may never end
    if len(data) > MAX_REQUEST:
        raise UserError(f"standard input: more than {MAX_REQUEST} bytes, the most that the sandbox takes at once")
    try:
        return data.decode("utf-8-sig")
    except ValueError:
        raise UserError("standard input is not UTF-8") from None


@sandbox_app.command("serve")
def sandbox_serve(
    host: Annotated[str, typer.Option(help="Address; anything but this machine's own needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    uds: Annotated[str | None, typer.Option(help="Unix socket instead of host and port.")] = None,
    uds_mode: Annotated[str, typer.Option(help="Permissions of that socket, octal.")] = "600",
    profile: Annotated[str, typer.Option(help="Warm interpreter of executions that name none.")] = "auto",
    workers: Annotated[int, typer.Option(min=0, max=1024, help="Executions at once; 0: 1.5 a core.")] = 0,
    tier: Annotated[str | None, typer.Option(help="Insist on one isolation tier.")] = None,
    require: Annotated[list[str] | None, typer.Option(help="Property that the tier must have; repeatable.")] = None,
    token_file: Annotated[
        str | None, typer.Option(help="Bearer tokens, one a line (or $RETOOL_SANDBOX_TOKEN).")
    ] = None,
    max_sessions: Annotated[int | None, typer.Option(min=0, max=4096, help="Most open sessions.")] = None,
    queue: Annotated[int, typer.Option(min=0, help="Executions that may wait; more get 429.")] = 1000,
    wall: Annotated[float, typer.Option(min=0.01, max=MOST_S, help="Default wall clock limit, seconds.")] = 5.0,
    memory: Annotated[int, typer.Option(min=16, max=MOST_MIB, help="Default memory limit, MiB.")] = 512,
    max_wall: Annotated[
        float, typer.Option(min=0.01, max=MOST_S, help="Most seconds that a request may ask for.")
    ] = 300.0,
    max_memory: Annotated[int, typer.Option(min=16, max=MOST_MIB, help="Most MiB that a request may ask for.")] = 16384,
    drain: Annotated[
        float, typer.Option(min=0, max=MOST_S, help="Seconds that running work gets after SIGTERM.")
    ] = 30.0,
    allow_unconfined: Annotated[bool, typer.Option(help="Serve without isolation when no tier holds.")] = False,
) -> None:
    """Serve the sandbox over HTTP: native API, SandboxFusion's endpoints, metrics (docs/sandbox-api.md)."""
    from retool.sandbox_command import serve_forever

    serve_forever(
        host=host,
        port=port,
        uds=uds,
        uds_mode=_octal(uds_mode),
        profile=profile,
        workers=workers,
        tier=tier,
        require=tuple(require or ()),
        token_file=token_file,
        max_sessions=max_sessions,
        queue=queue,
        limits=Limits(wall_s=wall, cpu_s=wall, memory_mb=memory),
        max_wall_s=max_wall,
        max_memory_mb=max_memory,
        drain_s=drain,
        allow_unconfined=allow_unconfined,
    )


def _octal(mode: str) -> int:
    try:
        return int(mode, 8)
    except ValueError:
        raise UserError(f"--uds-mode {mode!r}: write octal permissions, e.g. 660") from None


@sandbox_app.command("doctor")
def sandbox_doctor() -> None:
    """Attack this machine's isolation tiers and print what each one holds."""
    from retool.sandbox_command import print_capabilities

    print_capabilities()


@sandbox_app.command("bench")
def sandbox_bench(
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of each measurement.")] = 5.0,
    tier: Annotated[str | None, typer.Option(help="Measure this tier; default: the strongest that holds.")] = None,
    profile: Annotated[list[str] | None, typer.Option(help="Profiles to measure (repeatable).")] = None,
    part: Annotated[list[str] | None, typer.Option(help="Measure only this part (repeatable).")] = None,
    vs: Annotated[str, typer.Option(help="URL of another server with SandboxFusion's API, for a comparison.")] = "",
    output: Annotated[Path | None, typer.Option(help="Write everything as JSON.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Keep the other parts of an earlier --output.")] = False,
    quick: Annotated[bool, typer.Option(help="Fewer repetitions: a smoke test, not a measurement.")] = False,
) -> None:
    """Measure the sandbox on this machine: throughput, latency, sessions, overload, beside a cold Python.

    Parts: embedded, http, sessions, snippets, overload. The machine should be quiet; its load is reported, and how long
    a cold Python takes before and after each part. Where others make the machine slow, measure parts again at better
    moments: --part sessions --update --output FILE.
    """
    from retool.bench_command import bench

    raise typer.Exit(bench(seconds, tier, profile or [], part or [], vs, output, update, quick))


@sandbox_app.command("attack")
def sandbox_attack(
    tier: Annotated[str | None, typer.Option(help="ns, uid or self; default: the strongest that holds here.")] = None,
    only: Annotated[str, typer.Option(help="Part of a name, a theme, or a number such as `#15`.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Run the attack battery with its controls. Exit code 1 when anything gets through."""
    from retool.attack_command import attack

    raise typer.Exit(attack(tier, only, as_json))


@app.command()
def regrade(
    run: Annotated[Path, typer.Argument(help="Folder of an RL run.", show_default=False)],
    overrides: Overrides = None,
) -> None:
    """Ask the verifier again about trajectories whose reward stayed unknown, and write the verdicts to the log."""
    from retool.regrade import regrade as run_regrade

    counts = asyncio.run(run_regrade(run, overrides or []))
    console.print(", ".join(f"{n} {name}" for name, n in counts.items()), markup=False)


@data_app.command("generate")
def data_generate(recipe: RecipeArg, overrides: Overrides = None) -> None:
    """Write cold-start traces; every code block is executed, every answer verified. Resumable."""
    from retool.data_command import generate_data
    from retool.recipe import load_recipe

    generate_data(load_recipe(recipe, overrides or []))


@data_app.command("inspect")
def data_inspect(
    file: Annotated[Path, typer.Argument(help="JSONL of traces.")],
    show: Annotated[int, typer.Option(min=0, help="Print so many traces.")] = 2,
) -> None:
    """Statistics and examples of a file of traces."""
    from retool.data_command import inspect_data

    inspect_data(file, show)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"retool {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: maps errors to exit codes."""
    keep_standard_streams()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with suppress(OSError):  # a folder that was deleted holds none
        sys.path.append(str(Path.cwd()))  # a recipe may name a reward or a preset of the user's own, `module:name`
    try:
        app()
    except (UserError, ConfinementUnavailable) as e:
        _fail(e, 2)
    except KeyboardInterrupt:
        errors.print("interrupted")
        raise SystemExit(130) from None
    except OSError as e:
        if not (full := e.errno in (errno.ENOSPC, errno.EDQUOT)) and not (e.errno == errno.EPIPE and _nobody_reads()):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer of our output goes there
        if full:
            _fail(e, 1)
        raise SystemExit(1) from None  # whoever read our output has seen enough
    except Exception as e:
        if not isinstance(e, _our_failures()):
            raise
        _fail(e, 1)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    output = select.poll()
    output.register(1, 0)
    return bool(output.poll(0))


def _our_failures() -> tuple[type[Exception], ...]:
    """Failures of a run that say themselves what happened; their modules are loaded when they are raised."""
    found = (
        ("retool.engines.base", "EngineError"),
        ("retool.learner.guard", "LearnerStopped"),
        ("retool.rewards.pool", "VerifierError"),
        ("retool.rollout.collector", "RolloutError"),
        ("retool.rollout.log", "RolloutLogError"),
        ("retool.rollout.step_ledger", "StepLedgerError"),
    )
    loaded = (getattr(sys.modules[module], name) for module, name in found if module in sys.modules)
    return (SandboxError, *loaded)


def _fail(error: Exception, code: int) -> None:
    if os.environ.get("RETOOL_DEBUG"):
        raise error
    for line in str(error).splitlines() or [type(error).__name__]:
        errors.print(f"[bold red]error:[/] {escape(line)}", soft_wrap=True)
    raise SystemExit(code)
