"""Pictures of attention: the weights are those the layer uses, and the command draws them for every task."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lightning_modules import cli, explain
from mirrorla.attention import MirrorAttention
from mirrorla.attention_maps import attention_weights
from mirrorla.diagnostics import probe_layers
from mirrorla.feature_maps import PEERS
from mirrorla.kernels.op import mirror_linear_attention
from mirrorla.mirror_parameters import MirrorConfig
from tests.export_runs import config_of, save_run

SOFTMAX = "attention: [softmax, softmax, softmax, softmax]"


class Layer(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = MirrorAttention(16, 2, **options)

    def forward(self, images):
        return self.attention(images.flatten(2).mT, images.shape[2:])


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("modulation", ["none", "instance"])
def test_weights_times_values_are_what_the_layer_attends_to(power, modulation):
    torch.manual_seed(0)
    layer = Layer(mirror=MirrorConfig(power=power, modulation=modulation, init="uniform"))
    with torch.no_grad():
        for value in layer.parameters():
            value.add_(0.3 * torch.randn_like(value))
    images = torch.randn(2, 16, 3, 5)
    ((attention, probe),) = probe_layers(layer, images)
    assert probe.grid == (3, 5)
    queries = torch.tensor([0, 7, 14])
    weights = attention_weights(attention, probe, queries)
    found = torch.einsum("bhnm,bmhd->bnhd", weights, probe.v)
    q, k, v, _ = attention.project(images.flatten(2).mT)
    tables = attention.mirrors.token_tables(q, k, None, None)
    rope = attention.rope((3, 5), images.device)
    whole = mirror_linear_attention(q, k, v, mirror=tables, q_rope=rope, k_rope=rope, power=power)
    torch.testing.assert_close(found, whole[:, queries], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("modulation", ["none", "instance", "ema"])
def test_weights_of_several_mirrors_are_their_mean(modulation):
    torch.manual_seed(0)
    layer = Layer(mirror=MirrorConfig(modulation=modulation, power=2.0, query_mirrors=4, init="uniform")).eval()
    images = torch.randn(2, 16, 3, 5)
    ((attention, probe),) = probe_layers(layer, images)
    q, k, v, _ = attention.project(images.flatten(2).mT)
    tables = attention.mirrors.token_tables(q, k, None, None)
    mirrors = attention.mirrors.query_tables(tables)
    options = {"mirror": tables, "power": 2.0, **dict.fromkeys(("q_rope", "k_rope"), attention.rope((3, 5), q.device))}
    whole = mirror_linear_attention(q, k, v, query_mirrors=mirrors, **options)
    one_by_one = [mirror_linear_attention(q, k, v, query_mirrors=[one], **options) for one in mirrors]
    shares = [one.chunk(4, -1)[place] for place, one in enumerate(one_by_one)]
    torch.testing.assert_close(whole, torch.cat(shares, -1))
    weights = attention_weights(attention, probe, torch.arange(15))
    found = torch.einsum("bhnm,bmhd->bnhd", weights, probe.v)
    torch.testing.assert_close(found, torch.stack(one_by_one).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", PEERS)
def test_weights_of_peers_are_theirs_too(kind):
    torch.manual_seed(0)
    layer = Layer(kind=kind)
    images = torch.randn(2, 16, 3, 5)
    ((attention, probe),) = probe_layers(layer, images, softmax=True)
    queries = torch.tensor([0, 7, 14])
    weights = attention_weights(attention, probe, queries)
    q, k, v, _ = attention.project(images.flatten(2).mT)
    rope = attention.rope((3, 5), images.device)
    alike = v[..., :4].repeat(1, 1, 1, 2)  # both streams of polar see the same values
    whole = attention.map(q, k, alike, rope, rope, None)[:, queries]
    halves = whole[..., :4], whole[..., 4:]
    found = torch.einsum("bhnm,bmhd->bnhd", weights, v[..., :4])
    torch.testing.assert_close(found, (halves[0] + halves[1]) / 2, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 2000), st.integers(0, 6))
def test_a_pyramids_stride_is_recovered_from_its_tokens(pixels, exponent):
    tokens = -(-pixels // 2**exponent)
    side = explain.token_side(pixels, tokens)
    assert -(-pixels // side) == tokens
    assert tokens * side >= pixels


def test_patches_of_any_size_share_a_side_evenly():
    assert explain.token_side(224, 16) == 14


def test_rows_are_the_last_layers_of_each_size_or_spread_evenly():
    assert explain.chosen_layers([(8, 8), (4, 4), (4, 4), (2, 2)]) == [0, 2, 3]
    assert explain.chosen_layers([(8, 8)] * 12) == [0, 4, 7, 11]
    assert explain.chosen_layers([(8, 8)]) == [0]
    assert explain.chosen_layers([]) == []


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)).save(path)
    return path


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_a_run_of_every_task_is_drawn(task, picture, tmp_path, capsys):
    run = save_run(tmp_path / task, config_of(task))
    assert cli.main(["explain", str(run), str(picture), "--query", "0.5,0.5"]) == 0
    told = capsys.readouterr().err
    for name in ("attention", "mirrors"):
        file = run / "explain" / f"noise.{name}.png"
        assert str(file) in told
        with Image.open(file) as drawn:
            assert np.asarray(drawn.convert("L")).std() > 10


def test_softmax_has_attention_to_draw_and_no_mirrors(picture, tmp_path):
    config = config_of("classification").replace("name: mirrorla_pico", f"name: mirrorla_pico\n      {SOFTMAX}")
    run = save_run(tmp_path / "softmax", config)
    assert cli.main(["explain", str(run), str(picture)]) == 0
    assert [file.name for file in (run / "explain").iterdir()] == ["noise.attention.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "nothing.png"], "image nothing.png cannot be read: No such file or directory"),
        (["{run}", __file__], "cannot be read"),
        (["{run}", "{picture}", "--query", "1.5,0"], "'1.5,0' must lie in 0 … 1"),
        (["{run}", "{picture}", "--query", "here"], "'here' is no Y,X such as 0.5,0.25"),
        (["best", "{picture}"], "best of which run? give --run_dir RUN"),
    ],
)
def test_what_cannot_be_explained_is_refused_in_one_line(words, message, picture, tmp_path, capsys):
    run = save_run(tmp_path / "run", config_of("classification"))
    filled = [word.format(run=run, picture=picture) for word in words]
    assert cli.main(["explain", *filled]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1
