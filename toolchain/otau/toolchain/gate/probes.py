"""Observations that a compiled policy is judged on; nothing is tuned on them.

Three prefixes: `full` (all cameras, the longest prompt), `padded` (the same, half the prompt and all cameras
but the first masked) and `short` (one camera, an eighth of the prompt). Each is decoded in rows: one for
every delay up to the trained maximum, and for one, half and all of the chunk, which the graph serves too;
`short`, on which the damaged decoder is asked as well, has each delay with two noise seeds. A policy that
knows no delay gets two rows a probe.

At full size (968 tokens, chunk 50, 10 steps) `full` and `padded` cost 4.7 TFLOP each and `short` 1.3, and a
row 0.39 TFLOP: with no trained delay (0, 1, 25, 50) 16 rows, 6.2 TFLOP. Each more delay adds 4 rows, 1.6
TFLOP. The policy pays that once, the engines the prefixes once and the rows twice (on the reference's cache,
and in the chain). The noise floor adds 6 TFLOP of prefix and 4 rows, in bfloat16, the controls about 3 rows.
In memory and in the bundle: 38 MB a prefix of 1024 tokens, 90 MB in all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from otau.runtime.spec import Manifest

__all__ = [
    "CONTROL_PROBE",
    "CONTROL_ROWS",
    "FLOOR_PROBES",
    "FLOOR_ROWS",
    "PROBE_NAMES",
    "SEED_ROWS",
    "Probe",
    "ProbeFacts",
    "ProbeFactsFromManifest",
    "TensorShape",
    "make_probes",
    "probe_shapes",
]

PROBE_NAMES = ("full", "padded", "short")
CONTROL_PROBE = "short"
"""The cheapest probe: on it the damaged policy is asked, too."""
FLOOR_PROBES = ("full", "short")
"""The probes of the noise floor, each with its first two rows."""
FLOOR_ROWS = slice(0, 2)
SEED_ROWS = slice(0, 2)
"""The rows of the control probe that differ by the noise alone: delay 0, the same state."""
CONTROL_ROWS = slice(0, 1)
"""The rows of the control probe that the damaged decoder is asked."""
_OPEN, _CLOSE = 3, 2
"""Tokens of the texts around a state in the prefix."""

TensorShape = tuple[str, tuple[int, ...]]
"""numpy's name of a dtype, and a shape."""


@dataclass(frozen=True)
class ProbeFacts:
    """What of a policy decides the shapes and ranges of its probes and answers."""

    cameras: int
    height: int
    width: int
    image_tokens: int
    """Tokens a camera takes of the prefix."""
    prompt_length: int
    vocab: int
    layers: int
    kv_heads: int
    head_dim: int
    chunk: int
    action_dim: int
    """True number of dimensions."""
    max_action_dim: int
    max_state_dim: int
    max_delay: int
    real_time_chunking: bool
    state_in_prefix: bool
    state_in_decoder: bool

    @property
    def delays(self) -> tuple[int, ...]:
        """Every delay that is probed [control ticks]."""
        if not self.real_time_chunking:
            return (0,)
        return tuple(sorted({*range(self.max_delay + 1), 1, self.chunk // 2, self.chunk}))

    def row_delays(self, probe: str) -> tuple[int, ...]:
        """The delay of each row of a probe."""
        twice = probe == CONTROL_PROBE or not self.real_time_chunking
        return tuple(delay for delay in self.delays for _ in range(1 + twice))

    def sizes(self, probe: str) -> tuple[int, int]:
        """Cameras and prompt tokens of a probe."""
        if probe == "short":
            return 1, max(1, self.prompt_length // 8)
        return self.cameras, self.prompt_length

    def prefix_length(self, probe: str) -> int:
        """Prefix tokens P of a probe, the invalid ones among them."""
        cameras, tokens = self.sizes(probe)
        state = _OPEN + 1 + _CLOSE if self.state_in_prefix else 0
        return cameras * self.image_tokens + tokens + state


def ProbeFactsFromManifest(manifest: Manifest) -> ProbeFacts:  # noqa: N802 (<Target>From<Source>)
    """The facts that a bundle states."""
    return ProbeFacts(
        cameras=len(manifest.cameras),
        height=manifest.cameras[0].height,
        width=manifest.cameras[0].width,
        image_tokens=manifest.image_tokens,
        prompt_length=manifest.prompt.max_length,
        vocab=manifest.vocab,
        layers=manifest.kv_layers,
        kv_heads=manifest.kv_heads,
        head_dim=manifest.head_dim,
        chunk=manifest.flow.chunk,
        action_dim=manifest.action.dim,
        max_action_dim=manifest.action.max_dim,
        max_state_dim=manifest.state.max_dim,
        max_delay=manifest.flow.max_delay,
        real_time_chunking=manifest.flow.real_time_chunking,
        state_in_prefix=manifest.state_route == "prefix",
        state_in_decoder=manifest.state_route == "decoder",
    )


@dataclass(frozen=True, eq=False)
class Probe:
    """Inputs of the prefix and of the decoder, by the names that the graphs give them."""

    name: str
    prefix: dict[str, np.ndarray]
    """A batch of one."""
    decoder: dict[str, np.ndarray]
    """Without the cache; a batch of the probe's rows."""


def probe_shapes(facts: ProbeFacts, probe: str) -> tuple[dict[str, TensorShape], dict[str, TensorShape]]:
    """Dtypes and shapes of a probe's inputs: the prefix's and the decoder's."""
    cameras, tokens = facts.sizes(probe)
    rows = len(facts.row_delays(probe))
    prefix: dict[str, TensorShape] = {
        "images": ("float32", (1, cameras, 3, facts.height, facts.width)),
        "image_masks": ("bool", (1, cameras)),
        "tokens": ("int64", (1, tokens)),
        "token_masks": ("bool", (1, tokens)),
    }
    if facts.state_in_prefix:
        prefix["state"] = ("float32", (1, facts.max_state_dim))
        prefix["state_open"] = ("int64", (_OPEN,))
        prefix["state_close"] = ("int64", (_CLOSE,))
    chunk = (rows, facts.chunk, facts.max_action_dim)
    decoder: dict[str, TensorShape] = {"noise": ("float32", chunk)}
    if facts.real_time_chunking:
        decoder["action_prefix"] = ("float32", chunk)
        decoder["delay"] = ("int64", (rows,))
    if facts.state_in_decoder:
        decoder["state"] = ("float32", (rows, facts.max_state_dim))
    return prefix, decoder


def make_probes(facts: ProbeFacts, seed: int = 1) -> tuple[Probe, ...]:
    """The probes of a policy.

    Args:
        facts: Of the policy.
        seed: Another seed makes other probes of the same shapes.
    """
    return tuple(_probe(facts, name, [seed, number]) for number, name in enumerate(PROBE_NAMES))


def _probe(facts: ProbeFacts, name: str, seed: list[int]) -> Probe:
    random = np.random.default_rng(seed)

    def draw(key: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        if dtype == "bool":
            return np.ones(shape, bool)
        if dtype == "int64":
            return random.integers(0, facts.vocab, shape)
        if key == "images":
            return random.random(shape, np.float32) * 2 - 1
        return random.standard_normal(shape, np.float32)

    shapes = probe_shapes(facts, name)
    prefix, decoder = ({key: draw(key, *spec) for key, spec in side.items()} for side in shapes)
    if name == "padded":
        prefix["token_masks"][:, (facts.prompt_length + 1) // 2 :] = False
        prefix["image_masks"][:, 1:] = False
    if facts.real_time_chunking:
        decoder["delay"] = np.array(facts.row_delays(name), np.int64)
    if "state" in decoder and name == CONTROL_PROBE:
        decoder["state"][:] = decoder["state"][0]
    return Probe(name, prefix, decoder)
