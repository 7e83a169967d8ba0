"""The benchmarks of attention and backbones: the gate, what is measured, and the verb that starts them."""

import csv
import itertools
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import (
    attention_shapes,
    attention_tokens,
    backbone,
    backbone_profile,
    correctness,
    overtaking,
    rivals,
    timing,
)
from lightning_modules import bench_cli, cli

CPU = torch.device("cpu")
SMALL = rivals.Case("small", 2, 40, 40, 2, 16)


@pytest.fixture
def small(monkeypatch):
    """Two small shapes instead of the table's, and no process of its own for the cold start."""
    monkeypatch.setitem(rivals.CASES, "cpu", (SMALL, rivals.Case("across", 1, 12, 7, 2, 8)))
    monkeypatch.setattr(attention_shapes, "copy_rate", lambda device: 1e9)
    monkeypatch.setattr(attention_shapes, "cold_start", lambda case, device: {**COLD, "case": case.name})


COLD = {
    **attention_shapes._head("cold start", "mirrorla mirror rope", SMALL, "float32", "both"),
    "floor_bytes": "",
    **attention_shapes._EMPTY,
    "p50_ms": "1.0",
}


def read(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_implementation_direction_and_level_is_measured(small, tmp_path, capsys):
    out = tmp_path / "found.csv"
    assert cli.main(["bench", "attention", "--budget_s", "0.01", "--out", str(out)]) == 0
    rows = read(out)
    timed = {(row["level"], row["case"], row["implementation"], row["direction"]) for row in rows if row["p50_ms"]}
    kernels, layers = rivals.kernels(SMALL, CPU), rivals.layers(SMALL, CPU)
    assert {"mirrorla", "mirrorla mirror rope", "reference", "sdpa flash", "sdpa math"} <= set(kernels)
    expected = {
        ("kernel", case, *rest)
        for case, *rest in itertools.product(("small", "across"), kernels, attention_shapes.DIRECTIONS)
    }
    expected |= {("layer", "small", *rest) for rest in itertools.product(layers, ("forward", "both"))}
    expected |= {("cold start", case, "mirrorla mirror rope", "both") for case in ("small", "across")}
    assert timed == expected
    (row,) = (
        r
        for r in rows
        if (r["level"], r["case"], r["implementation"], r["direction"]) == ("kernel", "small", "mirrorla", "both")
    )
    assert row["floor_bytes"] == str(11 * 2 * 40 * 2 * 16 * 4)
    share = float(row["floor_bytes"]) / (float(row["p50_ms"]) * 1e-3) / 1e9
    assert float(row["share_of_copy"].rstrip("%")) == pytest.approx(100 * share, abs=0.06)
    assert row["commit"] and float(row["peak_mib"]) > 0 and "bound" in row["error"]
    assert out.with_suffix(".png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "correctness gate: all implementations are right" in printed and "copy rate 1 GB/s" in printed


def test_a_wrong_kernel_ends_the_run_before_anything_is_timed(small, tmp_path, capsys, monkeypatch):
    honest = rivals.kernels

    def spoilt(case, device):
        found = honest(case, device)
        right = found["mirrorla"].attend
        found["mirrorla"] = replace(found["mirrorla"], attend=lambda q, k, v: right(q, k, v) * (1 + 1e-4))
        return found

    monkeypatch.setattr(correctness, "kernels", spoilt)
    out = tmp_path / "found.csv"
    assert cli.main(["bench", "attention", "--only", "small", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "small: mirrorla output 1.0e-04 (bound 1.0e-05)" in printed and "nothing is timed" in printed
    assert not out.exists()


def test_a_rival_that_is_wrong_or_does_not_run_gets_a_note_and_no_time(small, tmp_path, monkeypatch):
    def fail(q, k, v):
        raise RuntimeError("no kernel for this card\nand a long trace")

    def with_losers(case, device):
        found = {name: rival for name, rival in honest(case, device).items() if name in ("mirrorla", "reference")}
        found["broken"] = replace(found["reference"], attend=fail)
        found["wrong"] = replace(found["reference"], attend=lambda q, k, v: 2 * found["reference"].attend(q, k, v))
        return found

    honest = rivals.kernels
    for module in (correctness, attention_shapes):
        monkeypatch.setattr(module, "kernels", with_losers)
    out = tmp_path / "found.csv"
    assert cli.main(["bench", "attention", "--only", "small", "--budget_s", "0.01", "--out", str(out)]) == 0
    rows = {(row["implementation"], row["direction"]): row for row in read(out) if row["level"] == "kernel"}
    assert rows["broken", "forward"]["note"] == "does not run: no kernel for this card"
    assert rows["wrong", "both"]["note"].startswith("output 1.0e+00 (bound 3.0e-02)")
    assert not rows["broken", "forward"]["p50_ms"] and rows["mirrorla", "forward"]["p50_ms"]


def test_the_gate_rounds_like_the_dtype():
    assert all(verdict.right for verdict in correctness.gate(SMALL, CPU, torch.bfloat16).values())


@pytest.mark.parametrize("case", rivals.CASES["cuda"], ids=lambda case: case.name)
def test_floors_are_4_7_and_11_tensors_for_self_attention(case):
    tensor = case.B * case.N * case.H * case.d * 2
    if case.N == case.M:
        assert [case.floor_bytes(d, 2) for d in attention_shapes.DIRECTIONS] == [4 * tensor, 7 * tensor, 11 * tensor]
    assert case.floor_bytes("both", 2) == case.floor_bytes("forward", 2) + case.floor_bytes("backward", 2)


def test_peak_memory_counts_what_lives_at_once():
    x = torch.ones(256, 1024)

    def run():
        y = x + 1
        z = y * 2
        del y
        return (z * 3).sum()

    assert timing.peak_mib(run, CPU) == pytest.approx(2.0, abs=0.01)


def test_cold_start_runs_in_a_process_of_its_own():
    row = attention_shapes.cold_start(replace(rivals.CASES["cpu"][1]), CPU)
    assert row["level"] == "cold start" and float(row["p50_ms"]) > 0


def test_a_layer_over_tokens_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(attention_tokens, "KINDS", ("mirror",))  # every point takes two processes
    monkeypatch.setattr(attention_tokens, "DIRECTIONS", ("forward+backward",))
    out = tmp_path / "tokens.csv"
    options = ["--over", "tokens", "--tokens", "4096", "--budget_s", "0.01", "--out", str(out)]
    assert cli.main(["bench", "attention", *options]) == 0
    (row,) = read(out)
    assert (row["kind"], row["direction"], row["N"]) == ("mirror", "forward+backward", "4096")
    assert float(row["p50_ms"]) > 0 and float(row["peak_mib"]) > 4 * 64 * 4096 * 4 / 2**20  # q, k, v and the gate
    assert out.with_suffix(".png").stat().st_size > 5000
    assert "forward+backward  mirror" in capsys.readouterr().out


def test_backbones_are_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(overtaking.TOKENS, "cpu", (16, 64))
    out = tmp_path / "backbone.csv"
    options = ["--models", "mirrorla_pico,resnet10t", "--sizes", "32,64x32", "--budget_s", "0.01", "--out", str(out)]
    assert cli.main(["bench", "backbone", *options]) == 0
    rows = read(out)
    assert [(row["model"], row["size"]) for row in rows] == list(
        zip(["mirrorla_pico", "resnet10t"] * 2, ["32", "32", "64x32", "64x32"], strict=True)
    )
    for row in rows:
        assert float(row["images_per_s"]) == pytest.approx(int(row["batch"]) / float(row["p50_ms"]) * 1e3, rel=1e-2)
        rate = int(row["batch"]) / float(row["inference_p50_ms"]) * 1e3
        assert float(row["inference_images_per_s"]) == pytest.approx(rate, rel=1e-2)
        assert float(row["params_m"]) * 4 / 1.05 < float(row["inference_peak_mib"]) < float(row["peak_mib"])
        assert float(row["peak_mib"]) > float(row["params_m"]) * 12  # weights and two moments alone, in fp32
    layers = read(tmp_path / "backbone_overtaking.csv")
    assert [(row["stage"], row["N"]) for row in layers] == list(itertools.product("1234", ("16", "64")))
    assert capsys.readouterr().out.count("stage ") == 4


@pytest.mark.parametrize(
    ("ratios", "told"),
    [
        ([2.0, 0.5], "linear attention is faster from N of about 128 on"),
        ([0.9, 0.5], "linear attention is faster from N <= 64 on"),
        ([2.0, 1.5], "softmax is faster up to N = 256"),
    ],
)
def test_the_crossing_is_interpolated_in_log_n(ratios, told):
    rows = [
        {"stage": "1", "C": "64", "H": "1", "N": str(n), "mirror": str(ratio), "softmax": "1.0"}
        for n, ratio in zip((64, 256), ratios, strict=True)
    ]
    assert overtaking.crossings(rows) == [f"stage 1 (C 64, 1 heads): {told}"]


def test_a_profile_puts_every_kind_of_operator_into_its_column(tmp_path, capsys):
    out = tmp_path / "profile.csv"
    assert backbone_profile.main(["--models", "mirrorla_pico", "--out", str(out)]) == 0
    (row,) = read(out)
    assert all(float(row[kind]) > 0 for kind in (*backbone_profile.KINDS, backbone_profile.REST, "AdamW"))
    printed = capsys.readouterr().out.splitlines()[-1]
    assert sum(int(cell) for cell in re.findall(r"(\d+)%", printed)) == pytest.approx(100, abs=3)
    assert backbone_profile.kind_of("aten::addmm", ["aten::linear"]) == "matrix products"
    assert backbone_profile.kind_of("aten::mul", ["Optimizer.step#AdamW.step"]) == "AdamW"
    assert backbone_profile.kind_of("aten::mul", ["MulBackward0"]) == backbone_profile.REST


def test_throughput_per_gmac_stands_beside_peers_that_were_measured():
    ours = {"model": "mirrorla_small", "size": "8x16", "gmacs": "2", "images_per_s": "3", "inference_images_per_s": "5"}
    peer = {**ours, "model": "pvt_v2_b2", "gmacs": "4", "inference_images_per_s": ""}
    lines = backbone_profile.per_gmac_table([ours, peer])
    assert lines[0].endswith("| training at 8x16 | inference at 8x16 |")
    assert lines[2:] == ["| pvt_v2_b2 | 0.50 | – |"]
    assert len(backbone_profile.per_gmac_table([peer])) == 2


def test_the_attention_of_our_models_stands_after_a_colon():
    assert backbone.build("mirrorla_pico:hybrid", (64, 64)).attention_kinds == (
        "mirror",
        "mirror",
        "softmax",
        "softmax",
    )
    assert backbone.build("mirrorla_pico:relu", (64, 64)).attention_kinds == ("relu",) * 4


def test_models_for_one_size_are_told_it():
    for name in ("deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mirrorla_pico"):
        assert backbone.build(name, (64, 96)).eval()(torch.zeros(1, 3, 64, 96)).shape == (1, 1000)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [],
            "error: which one? mirrorla bench attention|backbone|checkpoint|loader …; see mirrorla bench --help",
        ),
        (["atention"], "there is no benchmark 'atention'; did you mean 'attention'?"),
        (["zzz"], "there is no benchmark 'zzz'; choose one of attention, backbone, checkpoint, loader"),
        (["attention", "--devise", "cpu"], "unrecognized arguments: --devise cpu"),
        (["attention", "--device", "tpu"], "argument --device: invalid choice: 'tpu' (choose from "),
        (["attention", "--device", "cuda"], "--device cuda: torch sees no CUDA device; choose --device cpu"),
        (["backbone", "--device", "cuda"], "--device cuda: torch sees no CUDA device; choose --device cpu"),
        (["attention", "--only", "S1,S9"], "--only 'S9' is no case on cpu: choose from S1, S3, HR, PVT1, Sana"),
        (["attention", "--tokens", "4,x"], "argument --tokens: '4,x' must be whole numbers >= 1 by commas, such as"),
        (["backbone", "--models", "swin_tinny"], "'swin_tinny' is no model of timm or of ours; see mirrorla models"),
        (["backbone", "--models", "mirrorla_tiny:zzz"], "'mirrorla_tiny:zzz': ours alone take an attention: mirror, "),
        (["backbone", "--models", "resnet18:relu"], "'resnet18:relu': ours alone take an attention: mirror, "),
        (["backbone", "--sizes", "0"], "argument --sizes: '0' must be sides in pixels by commas"),
        (["backbone", "--sizes", "224,8x"], "argument --sizes: '224,8x' must be sides in pixels by commas, such as"),
        (["loader", "--images", "few"], "argument --images: invalid int value: 'few'"),
    ],
)
def test_mistakes_are_refused_in_one_line(words, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", *words]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


@pytest.mark.parametrize("name", bench_cli.BENCHMARKS)
def test_help_shows_the_options(name, capsys):
    assert cli.main(["bench", "--help"]) == 0
    assert f"\n  {name} " in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: mirrorla bench {name} ") and "--out" in text


def test_an_installation_without_the_repository_says_where_the_benchmarks_are(tmp_path):
    root = Path(bench_cli.__file__).resolve().parent.parent
    for package in ("lightning_modules", "mirrorla", "datamodules", "cluster"):
        (tmp_path / package).symlink_to(root / package)
    code = "import sys; sys.path[:] = [p for p in sys.path if p != sys.argv[1]]; from lightning_modules import cli; "
    code += "sys.exit(cli.main(['bench', 'attention']))"
    done = subprocess.run(
        [
            sys.executable,
            "-S",
            "-c",
            "import sys, site; sys.path[:0] = [sys.argv[2]]; sys.path += site.getsitepackages(); " + code,
            str(root),
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    told = "benchmarks/ is part of the repository and not of the wheel: pip install -e . in a checkout"
    assert done.stderr == f"mirrorla bench: error: {told}\n"
