import hashlib
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mirrorla import MirrorConfig, create_backbone, load_pretrained
from mirrorla.pretrained import read_weights


def weights(model):
    return {k: v.clone().contiguous() for k, v in model.state_dict().items()}


def pico(**options):
    return create_backbone("mirrorla_pico", **{"num_classes": 10, **options})


@pytest.mark.parametrize("wrap", ["safetensors", "torch", "lightning", "average", "compiled", "ema", "ddp"])
def test_every_kind_of_file_loads_completely(tmp_path, wrap):
    source, target = pico(), pico()
    state = weights(source)
    path = tmp_path / ("w.safetensors" if wrap == "safetensors" else "w.pt")
    if wrap == "safetensors":
        save_file(state, path)
    elif wrap == "torch":
        torch.save(state, path)
    elif wrap == "lightning":
        torch.save({"state_dict": {f"model._orig_mod.{k}": v for k, v in state.items()}, "epoch": 3}, path)
    elif wrap == "average":  # a training checkpoint of this project: trained and averaged weights side by side
        trained = {f"backbone.{k}": torch.zeros_like(v) for k, v in state.items()}
        torch.save({"state_dict": {**trained, **{f"ema.module.{k}": v for k, v in state.items()}}}, path)
    elif wrap == "compiled":
        torch.save({"state_dict": {f"backbone._orig_mod.{k}": v for k, v in state.items()}}, path)
    elif wrap == "ema":
        other = {f"model.{k}": torch.zeros_like(v) for k, v in state.items()}
        torch.save({"state_dict": other, "ema_state_dict": {f"model.{k}": v for k, v in state.items()}}, path)
    else:
        torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, path)
    report = load_pretrained(target, path)
    assert report.loaded == len(state) and not (report.missing or report.unexpected or report.mismatched)
    assert all(torch.equal(value, state[key]) for key, value in target.state_dict().items())
    assert str(report) == f"{len(state)} tensors loaded"


def test_another_class_count_keeps_the_classifier_and_says_so(tmp_path):
    save_file(weights(pico(num_classes=7)), tmp_path / "w.safetensors")
    target = pico()
    before = target.head.fc.weight.clone()
    report = load_pretrained(target, tmp_path / "w.safetensors")
    assert report.mismatched == ("head.fc.bias: 7, 10", "head.fc.weight: 7x256, 10x256")
    assert torch.equal(target.head.fc.weight, before)
    assert "2 mismatched (head.fc.bias" in str(report)


def test_a_dense_model_takes_a_classifiers_backbone(tmp_path):
    import timm

    save_file(weights(pico()), tmp_path / "w.safetensors")
    dense = timm.create_model("mirrorla_pico", features_only=True).model
    report = load_pretrained(dense, tmp_path / "w.safetensors")
    assert all(name.startswith("norms.") for name in report.missing) and len(report.missing) == 8
    assert all(name.startswith("head.") for name in report.unexpected)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: create_backbone("mirrorla_xtiny", num_classes=10), "checkpoint of another model: .* differs in shape"),
        (lambda: pico(mirror=MirrorConfig(cross_head=False)), "checkpoint of another model: .*mirrors.u is missing"),
        (lambda: pico(mirror=MirrorConfig(modulation="ema")), "running_rho is unknown here"),
    ],
)
def test_another_variant_is_refused_and_nothing_is_changed(tmp_path, other, message):
    save_file(weights(other()), tmp_path / "w.safetensors")
    target = pico()
    before = weights(target)
    with pytest.raises(ValueError, match=message):
        load_pretrained(target, tmp_path / "w.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.pt' do not exist: give a .safetensors or .pt file"):
        load_pretrained(pico(), tmp_path / "nothing.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="hold no tensors"):
        load_pretrained(pico(), tmp_path / "empty.pt")


def test_a_pickled_object_is_not_executed(tmp_path):
    marker = tmp_path / "touched"

    class Payload:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"state_dict": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="refused"):
        load_pretrained(pico(), tmp_path / "evil.pt")
    assert not marker.exists()


def test_create_backbone_starts_from_a_file(tmp_path):
    source = pico()
    save_file(weights(source), tmp_path / "w.safetensors")
    model = pico(pretrained=str(tmp_path / "w.safetensors"))
    assert torch.equal(model.stem[0][0].weight, source.stem[0][0].weight)


@pytest.mark.parametrize("name", ["resnet18", "test_convnext", "pvt_v2_b0"])
def test_a_peers_classifier_starts_its_dense_twin(tmp_path, name):
    from mirrorla.dense import create_dense_backbone

    source = create_backbone(name, num_classes=10).eval()
    save_file(weights(source), tmp_path / "w.safetensors")
    dense = create_dense_backbone(name, pretrained=str(tmp_path / "w.safetensors")).eval()
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(dense(image)[-1], source.forward_features(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@given(data=st.data())
@settings(max_examples=60)
def test_damaged_weights_are_refused_in_one_line(suffix, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"w{suffix}")
        save = torch.save if suffix == ".pt" else save_file
        save({"a": torch.ones(3, 2)}, path)
        good = path.read_bytes()
        damage = st.one_of(st.binary(max_size=64), st.integers(0, len(good) - 1).map(lambda size: good[:size]))
        path.write_bytes(data.draw(damage | st.just(b"step_00000330\n")))
        with pytest.raises(ValueError, match=r"are damaged .*export them with safetensors\Z") as caught:
            read_weights(path)
        assert "\n" not in str(caught.value)


def test_a_runs_newest_checkpoint_gives_its_weights(tmp_path):
    checkpoint = tmp_path / "run/checkpoints/step_00000003"
    checkpoint.mkdir(parents=True)
    model = pico()
    save_file(model.state_dict(), checkpoint / "model.safetensors")
    sha256 = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    (checkpoint / "MANIFEST.json").write_text(json.dumps({"files": {"model.safetensors": {"sha256": sha256}}}))
    (checkpoint.parent / "LATEST").write_text("step_00000003\n")
    found = read_weights(tmp_path / "run")
    assert found.keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="neither a training checkpoint nor a run"):
        read_weights(tmp_path)
