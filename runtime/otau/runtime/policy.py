"""The policy of a bundle: prefix -> ingest -> decode -> raw actions."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np

from otau.runtime.bundle import Bundle
from otau.runtime.engines import ENGINES, Engine, ResidentTensor, engine_class
from otau.runtime.errors import BundleError, EngineError, MismatchError, UsageError, nearest_name
from otau.runtime.manifest import GRAPHS
from otau.runtime.messages import excerpt
from otau.runtime.normalise import find_head
from otau.runtime.observation import Observation, ObservationBatch
from otau.runtime.prefix import KVCache, LocalPrefix, PrefixSource
from otau.runtime.spec import Manifest
from otau.runtime.vectors import ActionSpace

__all__ = ["ActionChunk", "IngestedCache", "Policy"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ActionChunk:
    """Actions to come, one a control tick. A batch has a leading dimension B."""

    actions: np.ndarray
    """(T, a) float32, raw and absolute, in the manifest's units."""
    normalised: np.ndarray
    """(T, A) float32, as the decoder gave them; columns from a on mean nothing."""
    timings: Mapping[str, float]
    """[ms] by stage: `prepare`, `prefix`, `ingest`, `decode`, `finish`."""
    n_action_steps: int
    """How many of the T actions are meant to be executed before the next chunk."""


@dataclass(frozen=True, eq=False)
class IngestedCache:
    """A KV cache laid out for the decoder, where the ingest engine left it; good for many denoises."""

    cache: KVCache
    tensors: Mapping[str, ResidentTensor]
    """`key_{l}` (B, Hkv, D, P) and `value_{l}` (B, Hkv, P, D) of every layer l."""
    milliseconds: float
    """How long the ingest took [ms]."""


class Policy:
    """A bundle's policy, ready to run.

    Example:
        with Policy.open("bundle") as policy:
            chunk = policy.infer(Observation(images, state, "pick up the red block"))
            robot.act(chunk.actions[0])

    Attributes:
        manifest: What the bundle takes and gives.
    """

    def __init__(
        self,
        bundle: Bundle,
        prefix: PrefixSource,
        ingest: Engine,
        decoder: Engine,
        *,
        norm_head: str | None = None,
    ) -> None:
        """Takes over source and engines and closes them; `Policy.open` makes the usual ones."""
        self.manifest: Manifest = bundle.manifest
        heads = self.manifest.norm.heads
        self._head = None if norm_head is None else find_head(norm_head, heads, bundle.path)
        self._prefix = prefix
        self._ingest = ingest
        self._decoder = decoder
        self._actions = ActionSpace(bundle.manifest, bundle.stats()["action"])

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        *,
        engine: str | None = None,
        threads: int | None = None,
        norm_head: str | None = None,
    ) -> Policy:
        """Opens a bundle with everything on this machine (placement `onboard`).

        Args:
            bundle: Its directory, or an opened bundle, which is not verified again.
            engine: Name of the engine; None takes the one the bundle was compiled for.
            threads: CPU threads of one operator; None lets the engine choose.
            norm_head: Name or number of the normalisation head of observations that don't say theirs.

        Raises:
            UsageError: No bundle is there, or no engine or head has that name.
            BundleError: The bundle is damaged.
            MismatchError: Its schema, engine or target does not fit this machine or otau.
        """
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle)
        kind = engine_class(engine) if engine is not None else _compiled_for(bundle)
        with ExitStack() as stack:
            engines = {}
            for name in GRAPHS:
                opened = kind.open(bundle.graph(name), target=bundle.manifest.target, threads=threads)
                engines[name] = stack.enter_context(opened)
                _check_graph(bundle, name, opened)
            source = LocalPrefix(bundle, engines["prefix"])
            policy = cls(bundle, source, engines["ingest"], engines["decoder"], norm_head=norm_head)
            stack.pop_all()
        return policy

    def prefix(self, observation: Observation) -> KVCache:
        """The KV cache of one observation (B = 1).

        Raises:
            UsageError: The observation is not what the bundle takes, or lacks a camera.
        """
        missing = [camera.name for camera in self.manifest.cameras if camera.name not in observation.images]
        if missing:
            raise UsageError(
                "the observation lacks a camera of the bundle",
                expected=", ".join(camera.name for camera in self.manifest.cameras),
                got=", ".join(observation.images) or "none",
                fix="a camera that is really absent: give a black picture, as training's server does, or"
                " compile without it: --absent-camera NAME",
            )
        return self.prefix_batch(observation.batch())

    def prefix_batch(self, batch: ObservationBatch) -> KVCache:
        """The KV cache of recorded observations, which may lack some cameras (a warning is logged)."""
        if batch.dataset_index is None and self._head is not None:
            rows = np.full(np.shape(batch.state)[:1], self._head, np.int64)
            batch = replace(batch, dataset_index=rows)
        return self._prefix.prefix(batch)

    def ingest(self, cache: KVCache) -> IngestedCache:
        """Lays a cache out for the decoder; once a cache, however often it is decoded from."""
        start = time.perf_counter()
        tensors = self._ingest.run_resident({name: cache.tensors[name] for name in ("keys", "values")})
        return IngestedCache(cache, tensors, (time.perf_counter() - start) * 1e3)

    def infer(
        self,
        observation: Observation,
        *,
        noise: np.ndarray | None = None,
        action_prefix: np.ndarray | None = None,
        delay: int = 0,
        rng: np.random.Generator | None = None,
    ) -> ActionChunk:
        """The action chunk of one observation.

        Args:
            observation: Every camera of the bundle, the raw state, and the task.
            noise: (T, A) where the flow starts; None draws it from `rng`.
            action_prefix: (k, a) raw actions that are committed already, k at least `delay`.
            delay: Leading actions of the chunk that are frozen to the prefix [control ticks].
            rng: Source of the noise; None makes a fresh one.

        Returns:
            Actions (T, a) and normalised (T, A).

        Raises:
            UsageError: The observation or an argument is not what the bundle takes.
            EngineError: A graph failed, or gave NaN.
        """
        cache = self.ingest(self.prefix(observation))
        chunk = self.decode_batch(
            cache,
            noise=None if noise is None else np.asarray(noise)[None],
            action_prefix=None if action_prefix is None else np.asarray(action_prefix)[None],
            delay=delay,
            rng=rng,
        )
        return replace(chunk, actions=chunk.actions[0], normalised=chunk.normalised[0])

    def decode_batch(
        self,
        ingested: IngestedCache,
        *,
        noise: np.ndarray | None = None,
        action_prefix: np.ndarray | None = None,
        delay: int | np.ndarray = 0,
        rng: np.random.Generator | None = None,
    ) -> ActionChunk:
        """The chunks of a batch; arguments as for `infer`, with a leading dimension B.

        `delay` may be one for all, or (B,).

        Returns:
            Actions (B, T, a) and normalised (B, T, A).
        """
        cache = ingested.cache
        start = time.perf_counter()
        inputs: dict[str, np.ndarray | ResidentTensor] = dict(ingested.tensors)
        inputs["prefix_mask"] = cache.tensors["prefix_mask"]
        inputs["noise"] = self._noise(noise, len(cache.state), rng)
        inputs |= self._frozen(cache, action_prefix, delay)
        if self.manifest.state_route == "decoder":
            inputs["state"] = cache.state_tensor
        prepared = time.perf_counter()
        normalised = self._decoder.run(inputs)["actions"]
        decoded = time.perf_counter()
        if not np.isfinite(normalised).all():
            raise EngineError(
                "the decoder's actions are not finite",
                where=self._decoder.model,
                got=f"{np.count_nonzero(~np.isfinite(normalised))} of {normalised.size} values",
                fix="do not move the robot; check the bundle's gates with `otau inspect`, and report it",
            )
        actions = self._actions.raw(normalised, cache.state, cache.dataset_index)
        timings = {
            **cache.timings,
            "ingest": ingested.milliseconds,
            "decode": (decoded - prepared) * 1e3,
            "finish": (prepared - start + time.perf_counter() - decoded) * 1e3,
        }
        return ActionChunk(actions, normalised, timings, self.manifest.flow.n_action_steps)

    def close(self) -> None:
        """Closes the engines; may be called twice."""
        self._prefix.close()
        self._ingest.close()
        self._decoder.close()

    def __enter__(self) -> Policy:
        """The policy itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the engines."""
        self.close()

    def _noise(self, noise: np.ndarray | None, size: int, rng: np.random.Generator | None) -> np.ndarray:
        """The flow's start (B, T, A), given or drawn."""
        shape = (size, self.manifest.flow.chunk, self.manifest.action.max_dim)
        if noise is None:
            return (rng or np.random.default_rng()).standard_normal(shape, np.float32)
        if noise.shape != shape or noise.dtype.kind != "f" or not np.isfinite(noise).all():
            raise UsageError(
                "the noise is not what the decoder starts from",
                expected=f"finite floats {shape}",
                got=f"{noise.dtype} {noise.shape}",
                fix="leave it out to have it drawn",
            )
        return noise.astype(np.float32, copy=False)

    def _frozen(
        self, cache: KVCache, action_prefix: np.ndarray | None, delay: int | np.ndarray
    ) -> dict[str, np.ndarray]:
        """The decoder's `action_prefix` and `delay`, where it takes them."""
        flow, size = self.manifest.flow, len(cache.state)
        delays = np.asarray(delay)
        if delays.dtype.kind not in "iu" or delays.shape not in ((), (1,), (size,)):
            raise UsageError(
                "the delay is not a number of control ticks",
                expected=f"an integer, or {size}",
                got=f"{delays.dtype} {delays.shape}",
                fix="give whole ticks, one number for all or one for each",
            )
        if not flow.real_time_chunking:
            if action_prefix is not None or delays.any():
                raise UsageError(
                    "this policy does not take committed actions",
                    expected="no action_prefix and delay 0",
                    got=f"delay {excerpt(delays)}",
                    fix="leave both out: the policy was trained without real-time chunking",
                )
            return {}
        if delays.min() < 0 or delays.max() > flow.chunk:
            raise UsageError(
                "the delay does not fit the chunk",
                expected=f"0..{flow.chunk} control ticks",
                got=excerpt(delays),
                fix="plan earlier, so that fewer actions are committed",
            )
        if delays.max() > flow.max_delay:
            _log.warning(
                "a delay of %d control ticks is more than the %d that the policy was trained with",
                delays.max(),
                flow.max_delay,
            )
        if action_prefix is None:
            action_prefix = np.zeros((size, 0, self.manifest.action.dim), np.float32)
        rows = self._actions.prefix(action_prefix, cache.state, cache.dataset_index)
        if action_prefix.shape[1] < delays.max():
            raise UsageError(
                "the action prefix is shorter than the delay",
                expected=f"at least {delays.max()} actions",
                got=action_prefix.shape[1],
                fix="give every committed action, raw and absolute",
            )
        return {"action_prefix": rows, "delay": np.full(size, delays, np.int64)}


def _compiled_for(bundle: Bundle) -> type[Engine]:
    """The class of the engine that the bundle was compiled for."""
    name = bundle.manifest.engine
    if name not in ENGINES:
        raise MismatchError(
            "the bundle was compiled for an engine that this otau does not have",
            where=bundle.path,
            expected=", ".join(sorted(ENGINES)),
            got=name,
            fix=f"{nearest_name(name, ENGINES)}; compile again, or install the otau that wrote the bundle",
        )
    return engine_class(name)


def _check_graph(bundle: Bundle, name: str, engine: Engine) -> None:
    """Refuses a graph whose inputs or outputs are not those that the manifest promises."""
    graph = bundle.manifest.graphs[name]
    for promised, found in ((graph.inputs, engine.inputs), (graph.outputs, engine.outputs)):
        expected = sorted(f"{tensor.name}: {tensor.dtype}" for tensor in promised)
        got = sorted(f"{tensor.name}: {tensor.dtype}" for tensor in found)
        if expected != got:
            raise BundleError(
                f"the {name} graph is not the one that the manifest describes",
                where=engine.model,
                expected=", ".join(expected),
                got=", ".join(got),
                fix="compile the checkpoint again",
            )
