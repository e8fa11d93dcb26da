"""What was pushed is what others get: v4surgery reads it back, transformers computes with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from huggingface_hub import ModelCard, snapshot_download

import v4surgery as v4
from tests.cli.conftest import Run
from tests.hub.conftest import cut_and_verify, recipe
from tests.hub.support import REPO, files_of, pushed
from tests.support import parents
from tests.support.hub import LoopbackHub
from tests.support.hub.write import Writes
from v4surgery.hub.card import make_card

# Prints "same" or the largest difference of the logits of two models, loaded by name.
COMPARE = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.arange(24).reshape(1, 24) % 64
logits = []
for name in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.inference_mode():
        logits.append(model.eval()(input_ids=ids, use_cache=False).logits)
assert torch.isfinite(logits[0]).all() and logits[0].std() > 0.01
print("same" if torch.equal(*logits) else (logits[0] - logits[1]).abs().max())
"""


def test_transformers_loads_from_the_hub_what_it_loads_from_the_folder(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path
) -> None:
    pushed(cli, replica, "--create")
    hub.reset_log()
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, REPO, str(replica)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "same\n"
    shards = {path.name for path in replica.glob("*.safetensors")}
    assert {request.file for request in hub.requests("storage")} == shards


def test_a_pushed_replica_is_a_parent(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path, tmp_path: Path
) -> None:
    pushed(cli, replica, "--create")
    again = tmp_path / "again.yaml"
    again.write_text("name: again\nkeep: {hidden_size: 64, layers: 2}\nstore: {dtype: bf16}\n")
    for parent, out in ((REPO, "remote"), (str(replica), "local")):
        done = cli("slice", "-r", again, "-p", parent, "-o", tmp_path / out, "-q")
        assert done.code == 0, done.err
    remote, local = (files_of(tmp_path / out) for out in ("remote", "local"))
    records = [json.loads(files.pop("v4surgery.json")) for files in (remote, local)]
    assert remote == local
    of_remote, of_local = records
    assert of_remote["tensors"] == of_local["tensors"]
    assert of_remote["parent"]["name"] == REPO
    assert of_remote["parent"]["revision"] == hub.repos[REPO].refs["main"]
    done = cli("verify", tmp_path / "remote", "-p", REPO)
    assert done.code == 0, done.err


def test_a_replica_of_a_pushed_one_has_it_as_base_model(
    hub: LoopbackHub, writes: Writes, cli: Run, published: Path, tmp_path: Path
) -> None:
    first = cut_and_verify(published, tmp_path / "first")
    pushed(cli, first, "--create")
    sha = hub.repos[REPO].refs["main"]
    with v4.open(REPO) as parent:
        v4.slice(v4.plan(parent, recipe(keep={"layers": 2})), tmp_path / "second")
    with v4.open(tmp_path / "second") as replica:
        card = make_card(replica)
    data = ModelCard(card).data.to_dict()
    assert (data["base_model"], data["license"]) == (REPO, "mit")
    assert f"| parent commit | {sha} |" in card


def test_a_copy_that_hf_downloads_is_verified_as_it_is(
    hub: LoopbackHub, writes: Writes, cli: Run, replica: Path, small_parent: Path
) -> None:
    pushed(cli, replica, "--create")
    folder = Path(snapshot_download(REPO))
    assert parents.read_tensors(folder) == parents.read_tensors(replica)
    assert cli("verify", folder, "-p", small_parent).code == 0
    assert "nothing was sent" in pushed(cli, folder).out
