"""The command `otau`, as real processes."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

BIN = Path(sys.executable).parent


def otau(*arguments, script="otau", **options):
    return subprocess.run(
        [BIN / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def refused(done, code, *words):
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr, done.stderr


@pytest.fixture
def recording(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "io.safetensors"
    inputs = {
        "inputs/image0": rng.random((2, 3, 8, 8), np.float32),
        "inputs/image1": rng.random((2, 3, 9, 7), np.float32),
        "inputs/state": rng.random((2, 3), np.float32),
        "inputs/lang_tokens": np.ones((2, 6), np.int64),
        "inputs/lang_masks": np.ones((2, 6), bool),
        "inputs/noise": rng.standard_normal((2, 5, 4), np.float32),
        "inputs/action_prefix": np.float32([[[1, 2]], [[3, 4]]]),
        "inputs/delay": np.array([1]),
        "inputs/dataset_index": np.array([0, 1]),
        "inputs/num_steps": np.array([10]),
        "outputs/actions": np.zeros((2, 5, 2), np.float32),
    }
    save_file(inputs, path)
    return path


def test_help_lists_every_verb_with_a_line():
    done = otau("--help")
    assert done.returncode == 0
    for verb in ("compile", "doctor", "infer", "init", "inspect", "run", "sign"):
        assert f"\n  {verb} " in done.stdout


@pytest.mark.parametrize("verb", ["infer", "inspect", "doctor", "sign"])
def test_the_help_of_a_verb_has_an_example_and_imports_nothing_heavy(verb, tmp_path):
    # Packages of these names that cannot be imported stand for their absence.
    for name in (
        "torch",
        "onnx",
        "transformers",
        "onnxruntime",
        "tokenizers",
        "safetensors",
        "mujoco",
        "numpy",
        "cryptography",
    ):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    done = otau(verb, "--help", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert f"Example: otau {verb}" in done.stdout
    assert "--json" in done.stdout


def test_version():
    assert otau("--version").stdout.startswith("otau 0.")


def test_an_unknown_verb_offers_the_nearest():
    refused(otau("infre"), 2, "did you mean 'infer'")


def test_an_unknown_option_is_a_mistake_of_usage(bundle):
    refused(otau("infer", bundle, "--dumy"), 2, "--dumy")


def test_an_alias_is_the_verb_of_its_name(tmp_path, bundle):
    script = tmp_path / "otau-inspect"
    script.write_text(f"#!{sys.executable}\nfrom otau.runtime.cli import alias\nalias()\n")
    script.chmod(0o755)
    done = subprocess.run([script, bundle, "--json"], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout)["kind"] == "bundle"


def test_infer_writes_what_the_golden_files_have(bundle, recording, tmp_path):
    out = tmp_path / "out.safetensors"
    done = otau("infer", bundle, "--inputs", recording, "--save", out, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    tensors = load_file(out)
    assert {name: value.shape for name, value in tensors.items()} == {
        "actions": (2, 5, 2),
        "actions_norm": (2, 5, 4),
        "prefix_pad_masks": (2, 8),
        **{f"{kind}_states_{layer}": (2, 8, 1, 4) for kind in ("key", "value") for layer in range(2)},
    }
    assert document["outputs"]["actions"] == {"shape": [2, 5, 2], "dtype": "float32"}
    assert document["timings_ms"].keys() == {"prepare", "prefix", "ingest", "decode", "finish"}
    # The frozen first action comes out as it was recorded.
    np.testing.assert_allclose(tensors["actions"][:, 0], [[1, 2], [3, 4]], atol=1e-5)


def test_infer_makes_up_the_same_observation_for_the_same_seed(bundle, tmp_path):
    results = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        done = otau("infer", bundle, "--dummy", "--seed", seed, "--save", tmp_path / name)
        assert done.returncode == 0, done.stderr
        results.append(load_file(tmp_path / name)["actions"])
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_infer_takes_a_prompt_in_place_of_the_files_ids(bundle, recording, tmp_path):
    for name, options in (("ids", ()), ("text", ("--prompt", "pick up"))):
        done = otau("infer", bundle, "--inputs", recording, "--save", tmp_path / name, *options)
        assert done.returncode == 0, done.stderr
    assert not np.array_equal(
        load_file(tmp_path / "ids")["key_states_0"], load_file(tmp_path / "text")["key_states_0"]
    )


def test_infer_refuses_bad_inputs(bundle, recording, tmp_path):
    out = tmp_path / "out.safetensors"
    refused(otau("infer", bundle, "--save", out), 2, "--inputs", "--dummy")
    refused(otau("infer", bundle, "--inputs", recording, "--dummy"), 2, "--dummy")
    refused(otau("infer", bundle, "--inputs", tmp_path / "none", "--save", out), 2, "cannot be read")
    refused(otau("infer", bundle, "--inputs", recording, "--save", recording), 2, "overwrite")
    refused(otau("infer", bundle, "--inputs", recording, "--save", tmp_path / "no/out"), 2, "cannot be saved")
    # Before the bundle is opened: nobody waits for a result that cannot be kept.
    refused(
        otau("infer", tmp_path / "nowhere", "--dummy", "--save", tmp_path / "no/out"), 2, "cannot be saved"
    )
    recording.write_bytes(recording.read_bytes()[:-10])
    refused(otau("infer", bundle, "--inputs", recording, "--save", out), 2, "cannot be read")
    assert not out.exists()


def test_a_damaged_bundle_exits_by_the_class_of_its_error(bundle, tmp_path):
    out = tmp_path / "out.safetensors"
    file = bundle / "decoder.onnx"
    damaged = bytearray(file.read_bytes())
    damaged[50] ^= 1
    file.write_bytes(damaged)
    refused(otau("infer", bundle, "--dummy", "--save", out), 1, "decoder.onnx", "changed")
    (bundle / "manifest.json").write_text('{"schema": 99}')
    refused(otau("infer", bundle, "--dummy", "--save", out), 3, "schema 99", "schema 2")
    refused(otau("infer", tmp_path / "nowhere", "--dummy"), 2, "no such bundle")
    assert not out.exists()


SLOW = """
import pathlib, sys, tempfile, time

def wait():
    with tempfile.TemporaryDirectory() as folder:
        print(folder, flush=True)
        time.sleep(60)

if {at_import}:
    wait()

def slow():
    wait()

def talk():
    for line in range(100_000):
        print("line", line)
"""


@pytest.fixture
def plugin(tmp_path):
    """Verbs of another package: `slow` waits in a temporary directory, `talk` has much to say."""

    def install(*, at_import):
        package = tmp_path / "plugin"
        (package / "otau_slow-0.dist-info").mkdir(parents=True)
        (package / "otau_slow.py").write_text(SLOW.replace("{at_import}", str(at_import)))
        (package / "otau_slow-0.dist-info/METADATA").write_text("Name: otau-slow\nVersion: 0\n")
        (package / "otau_slow-0.dist-info/entry_points.txt").write_text(
            "[otau.verbs]\nslow = otau_slow:slow\ntalk = otau_slow:talk\n"
        )
        return {**os.environ, "PYTHONPATH": str(package)}

    return install


@pytest.mark.parametrize("at_import", [False, True])
@pytest.mark.parametrize(
    ("number", "code", "words"), [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "")]
)
def test_a_signal_exits_as_the_shell_expects_and_cleans_up(plugin, number, code, words, at_import):
    process = subprocess.Popen(
        [BIN / "otau", "slow"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=plugin(at_import=at_import),
    )
    folder = Path(process.stdout.readline().strip())
    assert folder.is_dir()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "", words)
    assert not folder.exists()


def test_a_signal_while_the_command_line_itself_is_imported(tmp_path):
    # A typer that takes its time stands for a slow disk.
    (tmp_path / "typer.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [BIN / "otau", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")


def test_signals_are_caught_before_anything_slow_is_imported():
    code = "import sys, otau.runtime.cli; print({*sys.modules} & {'typer', 'numpy', 'msgspec', 'rich'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_public_names_are_imported_when_they_are_asked_for():
    code = """if True:
        import sys
        import otau.runtime
        assert {*otau.runtime.__all__} <= {*dir(otau.runtime)}
        assert not {*sys.modules} & {"numpy", "msgspec", "otau.runtime.bundle", "otau.runtime.errors"}
        for name in otau.runtime.__all__:
            scope = {}
            exec(f"from otau.runtime import {name}", scope)
            assert scope[name].__name__ == name
            assert vars(otau.runtime)[name] is scope[name]
        try:
            otau.runtime.Polcy
        except AttributeError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == "module 'otau.runtime' has no attribute 'Polcy'\n"


@pytest.mark.parametrize("verb", ["talk", "inspect", "inspect --json"])
def test_a_reader_that_goes_away_is_no_error(plugin, bundle, verb):
    arguments = verb.split()
    arguments[1:1] = [bundle] if verb.startswith("inspect") else []
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [BIN / "otau", *arguments],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env=plugin(at_import=False),
        timeout=60,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_infer_warns_of_nothing_when_it_refuses_a_huge_state(bundle, recording):
    tensors = load_file(recording) | {"inputs/state": np.full((2, 3), 3e38, np.float32)}
    save_file(tensors, recording)
    done = otau("infer", bundle, "--inputs", recording)
    refused(done, 2, "not finite")
    assert "Warning" not in done.stderr


def test_inspect_shows_a_bundle(bundle):
    text = otau("inspect", bundle).stdout
    for word in ("pi05", "front 8x8", "decoder.onnx", "parity", "tokenizer.json"):
        assert word in text
    document = json.loads(otau("inspect", bundle, "--json").stdout)
    assert document["manifest"]["policy"] == "pi05"
    assert document["manifest"]["fingerprint"] in "".join(text.split())


def test_inspect_verifies(bundle):
    (bundle / "README.md").unlink()
    refused(otau("inspect", bundle), 1, "missing", "README.md")


@pytest.fixture
def key(bundle, tmp_path):
    """A new private key, which has signed the bundle; its public key is beside it."""
    done = otau("sign", bundle, "--new-key", tmp_path / "key.pem")
    assert done.returncode == 0, done.stderr
    assert "not encrypted" in done.stdout
    return tmp_path / "key.pem"


def test_sign_and_inspect_agree(bundle, key):
    public = key.with_suffix(".pub")
    document = json.loads(otau("sign", bundle, "--key", key, "--json").stdout)
    assert document["key_ids"] == [document["key_id"]]
    inspected = json.loads(otau("inspect", bundle, "--json", "--require-signature", public).stdout)
    (entry,) = inspected["signatures"]
    assert (entry["key_id"], entry["valid"]) == (document["key_id"], True)
    assert inspected["manifest"]["fingerprint"] == document["fingerprint"]
    text = otau("inspect", bundle).stdout
    assert f"{entry['key_id']} (ed25519), valid" in " ".join(text.split())


def test_inspect_tells_signatures_that_do_not_fit_cannot_be_checked_or_are_not_there(
    bundle, key, make_bundle, tmp_path
):
    other = make_bundle(tmp_path / "other", policy="pi0")
    assert "unsigned" in otau("inspect", other).stdout
    (other / "signature.json").write_bytes((bundle / "signature.json").read_bytes())
    assert "NOT VALID" in otau("inspect", other).stdout
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent/cryptography.py").write_text("raise ImportError('not here')")
    without = {"env": {**os.environ, "PYTHONPATH": str(tmp_path / "absent")}}
    assert "not checked" in otau("inspect", bundle, **without).stdout
    assert json.loads(otau("inspect", bundle, "--json", **without).stdout)["signatures"][0]["valid"] is None
    required = otau("inspect", bundle, "--require-signature", key.with_suffix(".pub"), **without)
    refused(required, 3, "otau[sign]")
    refused(otau("sign", bundle, "--key", key, **without), 3, "otau[sign]")


def test_a_required_signature_refuses_by_exit_code(bundle, key, make_bundle, tmp_path, golden):
    public = key.with_suffix(".pub")
    unsigned = make_bundle(tmp_path / "unsigned")
    refused(otau("inspect", unsigned, "--require-signature", public), 1, "not signed")
    otau("sign", unsigned, "--new-key", tmp_path / "other.pem")
    refused(otau("inspect", unsigned, "--require-signature", public), 3, "not by a key")
    both = ("--require-signature", public, "--require-signature", tmp_path / "other.pub")
    assert otau("inspect", unsigned, *both).returncode == 0
    policy = {"env": {**os.environ, "OTAU_REQUIRE_SIGNATURE": str(public)}}
    refused(otau("infer", unsigned, "--dummy", **policy), 3, "OTAU_REQUIRE_SIGNATURE")
    assert otau("infer", bundle, "--dummy", **policy).returncode == 0
    # Signing is not opening: what is not signed yet can be.
    assert otau("sign", unsigned, "--key", key, **policy).returncode == 0
    assert otau("infer", unsigned, "--dummy", **policy).returncode == 0
    refused(otau("inspect", golden / "pi0", "--require-signature", public), 2, "only bundles are signed")


def test_sign_refuses_what_it_cannot_vouch_for(bundle, key, tmp_path):
    refused(otau("sign", bundle), 2, "--key", "--new-key")
    refused(otau("sign", bundle, "--key", key, "--new-key", tmp_path / "new.pem"), 2, "--key", "--new-key")
    refused(otau("sign", bundle, "--key", key.with_suffix(".pub")), 2, "public key")
    refused(otau("sign", bundle, "--new-key", key), 2, "overwritten")
    refused(otau("sign", bundle, "--new-key", bundle / "new.pem"), 2, "lie in the bundle")
    refused(otau("sign", tmp_path / "nowhere", "--key", key), 2, "no such bundle")
    (bundle / "README.md").write_text("changed")
    refused(otau("sign", bundle, "--new-key", tmp_path / "new.pem"), 1, "README.md")
    assert not (tmp_path / "new.pem").exists()


@pytest.fixture
def encrypted(tmp_path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    lock = serialization.BestAvailableEncryption("gehe\u0131m".encode())
    formats = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock
    (tmp_path / "locked.pem").write_bytes(Ed25519PrivateKey.generate().private_bytes(*formats))
    (tmp_path / "locked.pem").chmod(0o600)
    return tmp_path / "locked.pem"


def test_the_password_comes_from_the_environment(bundle, encrypted):
    for password, code in (("gehe\u0131m", 0), ("guess", 2)):
        done = otau("sign", bundle, "--key", encrypted, env={**os.environ, "OTAU_KEY_PASSWORD": password})
        assert done.returncode == code, done.stderr
    refused(otau("sign", bundle, "--key", encrypted, stdin=subprocess.DEVNULL), 2, "OTAU_KEY_PASSWORD")


def test_the_password_is_asked_for_on_a_terminal(bundle, encrypted):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [BIN / "otau", "sign", bundle, "--key", encrypted],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # getpass asks the controlling terminal, which this makes it.
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    shown = b""
    while b"password" not in shown:
        shown += os.read(ours, 100)
    os.write(ours, "gehe\u0131m\n".encode())
    out, err = process.communicate(timeout=60)
    os.close(ours)
    assert (process.returncode, err) == (0, b"")
    assert b"signed" in out
    assert b"gehe" not in shown + out


@pytest.mark.parametrize(("folder", "policy"), [("pi05_continuous", "pi05"), ("pi0", "pi0")])
def test_inspect_counts_a_checkpoint(golden, folder, policy):
    done = otau("inspect", golden / folder, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    tensors = load_file(golden / folder / "model.safetensors")
    assert document["policy"] == policy
    assert document["tensors"] == len(tensors)
    assert document["parameters"] == sum(value.size for value in tensors.values())
    assert document["dtypes"] == {"F32": document["parameters"]}
    assert list(document["cameras"].values()) == [[3, 28, 28]] * 2
    text = otau("inspect", golden / folder)
    assert policy in text.stdout
    assert "model.safetensors" in text.stdout


def test_inspect_of_a_zero_checkpoint_opens_no_pickle(golden):
    document = json.loads(otau("inspect", golden / "zero/opentau_shaped_zero2", "--json").stdout)
    assert document["weights"] == ["latest (DeepSpeed ZeRO)"]
    assert document["parameters"] == 0


def test_inspect_refuses_what_it_cannot_read(golden, tmp_path):
    refused(otau("inspect", tmp_path / "nowhere"), 2, "no such directory")
    refused(otau("inspect", tmp_path), 2, "neither a bundle nor a checkpoint")
    (tmp_path / "config.json").write_text("{broken")
    refused(otau("inspect", tmp_path), 1, "config.json", "cannot be read")
    (tmp_path / "config.json").write_text("[]")
    refused(otau("inspect", tmp_path), 1, "no policy")
    (tmp_path / "config.json").write_text('{"type": "pi05", "input_features": {"state": {"shape": "?"}}}')
    (tmp_path / "model.safetensors").write_bytes((golden / "pi0/model.safetensors").read_bytes()[:100])
    refused(otau("inspect", tmp_path), 1, "model.safetensors", "cannot be read")


def test_doctor_tells_facts_and_jobs():
    done = otau("doctor", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    facts = document["facts"]
    assert facts["packages"]["numpy"] == np.__version__
    assert "CPUExecutionProvider" in facts["onnxruntime providers"]
    assert set(facts["mujoco rendering"]) == {"egl", "osmesa"}
    assert document["jobs"]["run a bundle"] == {"ready": True, "missing": [], "install": []}
    assert "run a bundle" in otau("doctor").stdout
