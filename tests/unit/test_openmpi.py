"""What is set for Open MPI is set where nobody else has chosen."""

import pytest

from hpc_lbsgd.parallel.openmpi import spare_one_sided


@pytest.mark.parametrize(
    "own, users_file, sites_file, set_before, expected",
    [
        (True, None, None, None, "^ofi"),
        (True, "btl_tcp_if_include = eth0\n# btl = tcp\n", None, None, "^ofi"),
        (True, " btl=self,tcp\n", None, None, None),
        (True, None, "btl = ^uct", None, None),
        (True, None, None, "self,tcp", "self,tcp"),
        (False, None, None, None, None),  # the site's MPI
    ],
)
def test_one_sided_transfers_are_spared(tmp_path, monkeypatch, own, users_file, sites_file, set_before, expected):
    prefix, home = tmp_path / "environment", tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    files = {
        prefix / "bin" / "mpirun": "" if own else None,
        home / ".openmpi" / "mca-params.conf": users_file,
        prefix / "etc" / "openmpi-mca-params.conf": sites_file,
    }
    for path, content in files.items():
        path.parent.mkdir(parents=True)
        if content is not None:
            path.write_text(content)
    env = {} if set_before is None else {"OMPI_MCA_btl": set_before}
    spare_one_sided(env, prefix)
    assert env.get("OMPI_MCA_btl") == expected
