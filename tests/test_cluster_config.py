"""What is asked of SLURM: read from YAML and options, every mistake named with its mend."""

import pytest

from cluster.config import SlurmConfig, seconds
from cluster.settings import merge, overrides, slurm_section, without_section
from mirrorla.config_files import find_config, packaged_configs

PACKAGED = [name for name in packaged_configs() if name.startswith("slurm/")]


def read(text, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return merge([(str(path), slurm_section(path))])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("4:00:00", 14_400),
        ("1-12", 129_600),
        ("1-0:30", 88_200),
        ("2-01:02:03", 176_523),
    ],
)
def test_time_limits_mean_what_slurm_says(text, expected):
    assert seconds(text) == expected


def test_yaml_values_stay_as_written(tmp_path):
    config = read("slurm:\n  time: 4:00:00\n  memory: 0\n  account: 007\n  gpu_type: null\n", tmp_path)
    assert (config.time, config.memory, config.account, config.gpu_type) == ("4:00:00", "0", "007", None)


def test_later_layers_win_and_variables_add_up():
    layers = [("a", {"nodes": "2", "environment": {"A": "1", "B": "1"}})]
    layers += [
        ("b", overrides([("nodes", "4"), ("environment.B", "2"), ("modules", "cuda,gcc"), ("requeue", "false")]))
    ]
    config = merge(layers)
    assert (config.nodes, config.environment, config.modules) == (4, {"A": "1", "B": "2"}, ("cuda", "gcc"))
    assert not config.requeue


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"nods": "2"}, "unknown key slurm.nods (here); nearest: slurm.nodes"),
        ({"nodes": "two"}, "slurm.nodes 'two' (here) is not valid; expected a whole number"),
        ({"nodes": "0"}, "slurm.nodes 0 must be from 1 to 100000"),
        ({"min_free_gib": "nan"}, "slurm.min_free_gib nan must be from 0"),
        ({"requeue": "yes"}, "slurm.requeue 'yes' (here) is not valid; expected true or false"),
        ({"launcher": "mpirun"}, "slurm.launcher 'mpirun' (here) is not valid; expected one of srun, torchrun"),
        ({"partition": "gpu; rm"}, "slurm.partition 'gpu; rm' is not valid; for example gpu or gpu,debug"),
        ({"time": "soon"}, "slurm.time 'soon' is not valid; for example 1-00:00:00"),
        ({"time": "0"}, "slurm.time '0' is no time at all"),
        ({"time": "10:00"}, "slurm.signal_lead_s 300 leaves less than half of slurm.time 10:00 for training; at most"),
        ({"tasks_per_node": "4", "gpus_per_node": "8"}, "tasks_per_node 4 differs from gpus_per_node 8"),
        ({"gpu_type": "a100", "gpus_per_node": "0"}, "slurm.gpu_type 'a100' needs gpus_per_node of 1 or above"),
        ({"min_nodes": "3", "nodes": "2"}, "slurm.min_nodes 3 is above nodes 2; at most 2"),
        ({"environment": {"A-B": "1"}}, "slurm.environment 'A-B' is no name of a variable"),
        ({"environment": {"A": "1\n2"}}, r"slurm.environment A '1\n2' must be one line"),
        ({"environment": "A=1"}, "expected NAME: value lines"),
        ({"container_mounts": "/a:/b"}, "slurm.container_mounts '/a:/b' needs a slurm.container"),
        ({"launcher": "torchrun", "min_bandwidth_gb_s": "5"}, "slurm.min_bandwidth_gb_s 5 needs launcher srun"),
    ],
)
def test_mistakes_are_named_with_their_mend(layer, message):
    with pytest.raises(ValueError) as error:
        merge([("here", layer)])
    assert message in str(error.value)


def test_a_key_given_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"duplicate key nodes \(line 3\)"):
        read("slurm:\n  nodes: 1\n  nodes: 2\n", tmp_path)


def test_the_section_leaves_a_file_and_every_other_line_stays_where_it_is(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("# about\nmodel: a # why\nslurm:\n  nodes: 2\n  # note\n\ndata: b\n")
    assert without_section(path) == "# about\nmodel: a # why\n\n\n\n\ndata: b\n"
    assert slurm_section(path) == {"nodes": "2"}


@pytest.mark.parametrize("name", PACKAGED)
def test_every_packaged_request_is_valid(name):
    path = find_config(name)
    assert isinstance(merge([(name, slurm_section(path))]), SlurmConfig)


def test_the_packaged_sizes_are_those_that_were_promised():
    worlds = {name: merge([(name, slurm_section(find_config(name)))]).world_size for name in PACKAGED}
    assert worlds == {"slurm/debug": 1, "slurm/one_node": 8, "slurm/four_nodes": 32, "slurm/sixteen_nodes": 128}
