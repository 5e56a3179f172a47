"""`otau run`: drives a robot with a bundle."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from otau.runtime.cli.options import RequireSignature

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["run"]


def run(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory of the bundle.")],
    robot: Annotated[
        str, typer.Option(metavar="NAME:TASK", help="Such as robosuite:Lift or libero:libero_object/0.")
    ],
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Actions at most.", show_default="as many as the task allows"),
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(metavar="OUT.mp4", help="Film it; a simulator is then slower.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the robot's start and of the noise.")] = 0,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The task.", show_default="the robot's own")
    ] = None,
    norm_head: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Normalisation head of this robot, by name or number.",
            show_default="the bundle's only one",
        ),
    ] = None,
    realtime: Annotated[bool, typer.Option("--realtime", help="Pace a simulator by the clock.")] = False,
    libero_assets: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="LIBERO's meshes and textures.",
            show_default="$OTAU_LIBERO_ASSETS, else the originals from the hub",
        ),
    ] = None,
    require_signature: RequireSignature = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Drive a robot with a bundle: observe, infer when the chunk runs out, act.

    A real robot is paced by the clock. A simulated one advances by one tick an action and waits for
    the policy, so it runs as fast as it can, unless --realtime is given. The robot is stopped first
    whatever happens, on Ctrl-C too; a video then holds what was filmed so far.

    Example: otau run my_bundle --robot robosuite:Lift --steps 200 --video lift.mp4
    """
    from otau.robot.streams import stdout_to_stderr

    options = {} if libero_assets is None else {"assets": libero_assets}
    with stdout_to_stderr():
        document = _drive(
            bundle, robot, options, steps, video, seed, prompt, norm_head, realtime, require_signature
        )
    print(json.dumps(document, indent=2) if json_output else _summary(document))


def _drive(
    bundle_path: Path,
    target: str,
    options: dict[str, Any],
    steps: int | None,
    video: Path | None,
    seed: int,
    prompt: str | None,
    norm_head: str | None,
    realtime: bool,
    require_signature: list[Path] | None,
) -> dict[str, Any]:
    """Run the episode and say what happened; whatever does not fit is refused before anything moves."""
    from otau.robot.episode import run_episode
    from otau.robot.registry import open_robot, robot_names
    from otau.robot.video import VideoWriter
    from otau.runtime import Bundle, Policy
    from otau.runtime.errors import UsageError

    name, _, task = target.partition(":")
    if "assets" in options and name != "libero" and name in robot_names():
        raise UsageError(
            "--libero-assets is for LIBERO only",
            where=f"--robot {target}",
            expected="--robot libero:SUITE/TASK",
            fix="leave --libero-assets out",
        )
    bundle = Bundle.open(bundle_path, require_signature=require_signature)
    with ExitStack() as stack:
        robot = stack.enter_context(open_robot(target, **options))
        spec = robot.spec
        bundle.require(
            cameras=[camera.name for camera in spec.cameras],
            state_names=spec.state.names,
            action_names=spec.action.names,
        )
        if bundle.manifest.prompt.tokenizer is None:
            raise UsageError(
                "the bundle takes token ids, so it cannot be told the task",
                where=bundle.path,
                fix="compile it with --tokenizer DIR",
            )
        limit = steps or spec.max_steps
        if limit is None:
            raise UsageError("nothing ends an episode of this robot", where=target, fix="give --steps N")
        policy = stack.enter_context(Policy.open(bundle, norm_head=norm_head))
        film = None if video is None else stack.enter_context(VideoWriter(video, spec.rate))
        result = run_episode(
            robot,
            policy,
            steps=limit,
            prompt=prompt,
            seed=seed,
            realtime=realtime,
            on_frame=None if film is None else film.write,
            on_step=stack.enter_context(_progress(limit)),
        )
    return {
        "robot": name,
        "task": task,
        "bundle": str(bundle.path),
        "prompt": spec.prompt if prompt is None else prompt,
        "assets": spec.assets,
        "seed": seed,
        "rate_hz": spec.rate,
        "steps": result.steps,
        "chunks": len(result.latencies_ms),
        "success": result.success,
        "latency_ms": {"p50": result.latency_ms(50), "p99": result.latency_ms(99)},
        "late_ticks": result.late_ticks,
        "video": None if video is None else str(video),
    }


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None] | None]:
    """A bar on stderr where that is a terminal, as something to call with the number of steps."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("steps", total=total)
        yield lambda done: bar.update(task, completed=done)


def _summary(document: dict[str, Any]) -> str:
    """The document for people."""
    latency = document["latency_ms"]
    success = {True: "yes", False: "no", None: "unknown to the robot"}[document["success"]]
    lines = [
        f"robot     {document['robot']}:{document['task']}, {document['prompt']!r}",
        f"steps     {document['steps']} at {document['rate_hz']:g} Hz, from {document['chunks']} chunks",
        f"latency   p50 {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} ms a chunk",
        f"success   {success}",
    ]
    if document["assets"] == "hub":
        lines.append("assets    the originals, from the hub")
    elif document["assets"] is not None:
        lines.append(f"assets    {document['assets']}, which may not be the originals:")
        lines.append("          compare success measured with them with each other, not with published rates")
    if document["late_ticks"] is not None:
        lines.append(f"late      {document['late_ticks']} ticks")
    if document["video"] is not None:
        lines.append(f"video     {document['video']}")
    return "\n".join(lines)
