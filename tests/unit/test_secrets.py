"""What a person's shell knows does not get into a run folder, which others may read."""

from conftest import changed, command, write_recipe

from hpc_lbsgd.train.environment import settings_of

SECRETS = {
    "GITHUB_TOKEN": "s3cret-a", "AWS_SECRET_ACCESS_KEY": "s3cret-b", "DB_PASSWORD": "s3cret-c",
    "HOROVOD_SECRET_KEY": "s3cret-d", "NCCL_AUTH_TOKEN": "s3cret-e",
    "OMPI_MCA_orte_precondition_transports": "s3cret-f",
    "OMPI_MCA_sec_password": "s3cret-g", "OMP_API_KEY": "s3cret-h", "SESSION_COOKIE": "s3cret-i",
}  # fmt: skip


def test_settings_have_no_secrets():
    plain = {"OMP_NUM_THREADS": "2", "NCCL_DEBUG": "INFO", "HOROVOD_FUSION_THRESHOLD": "0", "HOME": "/root"}
    assert settings_of(plain | SECRETS) == {k: v for k, v in plain.items() if k != "HOME"}


def test_no_file_of_a_run_has_one(small_recipe, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", changed(small_recipe, train__max_steps=2, machine__engine="torch"))
    result = command("train", recipe, "--run", tmp_path / "run", env=SECRETS)
    assert result.returncode == 0, result.stderr
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert len(files) > 6 and b"s3cret" not in b"".join(p.read_bytes() for p in files) + result.stderr.encode()
