"""Rank and size as each launcher tells them, and the traps: nested launchers, leftovers, hostile values."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.env import SOURCES, Environment, identify
from harness.errors import Exit, Unavailable

OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "7",  # counts across jobs: no node index
    "PMIX_RANK": "3",
}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
}
BATCH_SHELL = {  # what every process under `mpirun` in a batch script inherits, on every node
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_TASKS_PER_NODE": "2(x4)",
}


@pytest.mark.parametrize(
    ("environ", "launcher", "local"),
    [
        (OPENMPI, "openmpi", (1, 2)),
        (
            {
                "HOROVOD_RANK": "3",
                "HOROVOD_SIZE": "8",
                "HOROVOD_LOCAL_RANK": "1",
                "HOROVOD_LOCAL_SIZE": "2",
                "HOROVOD_CROSS_RANK": "1",
                "HOROVOD_CROSS_SIZE": "4",
            },
            "horovodrun-gloo",
            (1, 2),
        ),
        (
            {
                "MV2_COMM_WORLD_RANK": "3",
                "MV2_COMM_WORLD_SIZE": "8",
                "MV2_COMM_WORLD_LOCAL_RANK": "1",
                "MV2_COMM_WORLD_LOCAL_SIZE": "2",
            },
            "mvapich",
            (1, 2),
        ),
        ({"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, "hydra", (1, 2)),
        ({"PMI_RANK": "3", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"}, "hydra", (1, 2)),
        (
            {"PALS_RANKID": "3", "PALS_SIZE": "8", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "2"},
            "hydra",
            (1, 2),
        ),
        (
            {"JSM_NAMESPACE_RANK": "3", "JSM_NAMESPACE_SIZE": "8", "JSM_NAMESPACE_LOCAL_RANK": "1"},
            "jsrun",
            (1, None),
        ),
        ({"FLUX_TASK_RANK": "3", "FLUX_JOB_SIZE": "8", "FLUX_TASK_LOCAL_ID": "1"}, "flux", (1, None)),
        (SRUN, "slurm", (1, 2)),
        ({**SRUN, "PMIX_RANK": "3"}, "slurm", (1, 2)),
    ],
)
def test_each_launcher(environ, launcher, local):
    found = identify(environ)
    assert (found.launcher, found.rank, found.size) == (launcher, 3, 8)
    assert (found.local_rank, found.local_size) == local
    assert found.gloo is (launcher == "horovodrun-gloo")


def test_no_launcher_is_one_rank():
    assert identify({}) == Environment("none", 0, 1, 0, 1, socket.gethostname(), None, None)


def test_mpirun_inside_slurm_is_mpirun():
    """Every rank of a mpirun in a batch script sees SLURM_PROCID=0."""
    for mpi, launcher in ((OPENMPI, "openmpi"), ({"PMI_RANK": "3", "PMI_SIZE": "8"}, "hydra")):
        found = identify({**BATCH_SHELL, **mpi})
        assert (found.launcher, found.rank, found.size, found.job) == (launcher, 3, 8, "77")


def test_mpirun_inside_an_interactive_step_is_mpirun():
    assert identify({**SRUN, "SLURM_PROCID": "0", **OPENMPI}).rank == 3


def test_the_batch_shell_itself_is_one_rank():
    found = identify(BATCH_SHELL)
    assert (found.launcher, found.rank, found.size, found.job) == ("none", 0, 1, "77")


def test_gloo_under_slurm_and_mpi_is_gloo():
    found = identify({**SRUN, **OPENMPI, "HOROVOD_RANK": "5", "HOROVOD_SIZE": "6", "HOROVOD_HOSTNAME": "n7"})
    assert (found.launcher, found.rank, found.size, found.host) == ("horovodrun-gloo", 5, 6, "n7")


def test_pmix_rank_alone_says_nothing():
    assert identify({"PMIX_RANK": "3"}).size == 1


@pytest.mark.parametrize(
    ("tasks", "node", "here"),
    [
        ("3,1", "0", 3),
        ("3,1", "1", 1),
        ("4(x2),3", "1", 4),
        ("4(x2),3", "2", 3),
        ("2(x4)", "3", 2),
        ("2(x4)", "4", None),
        ("nonsense", "0", None),
        ("1(x999999999)", "999999998", 1),
        ("", "0", None),
    ],
)
def test_uneven_slurm_nodes(tasks, node, here):
    environ = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node}
    assert identify(environ).local_size == here


def test_job_ids():
    assert identify({"PBS_JOBID": "12.server"}).job == "12.server"
    assert identify({"LSB_JOBID": "9"}).job == "9"
    assert identify({"SLURM_JOB_ID": "1", "PBS_JOBID": "2"}).job == "1"


def test_attempt():
    assert identify({"HARNESS_ATTEMPT": "3"}).attempt == 3
    with pytest.raises(Unavailable, match="HARNESS_ATTEMPT is 'x', not a number"):
        identify({"HARNESS_ATTEMPT": "x"})


@pytest.mark.parametrize("value", ["-1", "one", "1.0", " 1", "0x1", "1" * 10, "1" * 10**6, "1\n", "²"])
def test_a_rank_that_is_no_number_is_told_with_its_name(value):
    with pytest.raises(Unavailable, match=r"OMPI_COMM_WORLD_RANK is .*, not a number") as caught:
        identify({**OPENMPI, "OMPI_COMM_WORLD_RANK": value})
    assert caught.value.code == Exit.UNAVAILABLE
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("rank", "size"), [("8", "8"), ("0", "0"), ("9", "2")])
def test_an_impossible_rank(rank, size):
    with pytest.raises(Unavailable, match=f"rank {rank} of {size}, which cannot be"):
        identify({"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": size})


def test_an_empty_variable_is_an_unset_one():
    assert identify({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_RANK": ""}).local_rank is None
    assert identify({**OPENMPI, "OMPI_COMM_WORLD_RANK": "", "PMIX_RANK": ""}).launcher == "none"


NAMES = sorted(
    {name for source in SOURCES for names in (source.rank, source.size, source.local_rank) for name in names}
)


@given(st.dictionaries(st.sampled_from([*NAMES, "SLURM_STEP_ID", "SLURM_STEP_TASKS_PER_NODE"]), st.text(max_size=12)))
def test_any_environment_gives_a_valid_place_or_a_sentence(environ):
    try:
        found = identify(environ)
    except Unavailable:
        return
    assert 0 <= found.rank < found.size


def test_a_shell_that_srun_started_is_no_rank() -> None:
    """`srun --pty bash`, then a start without any launcher. With PMIx, the one task is a rank of its own."""
    shell = SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
    assert identify(shell).launcher == "none"
    assert identify(shell | {"PMIX_RANK": "0"}).launcher == "slurm"


def test_elastic_is_a_way_of_horovodrun() -> None:
    gloo = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_ELASTIC": "1"}
    assert identify(gloo).elastic and not identify(gloo | {"HOROVOD_ELASTIC": "0"}).elastic
    assert not identify({"HOROVOD_ELASTIC": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}).elastic
