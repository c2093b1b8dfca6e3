-- For Lmod. `make module` fills in the names between @ signs.
help([[hpc_lbsgd: large-minibatch SGD on supercomputers (Horovod over MPI, DALI, Slurm).

    hpc-lbsgd doctor                 what this machine and environment can do
    hpc-lbsgd plan RECIPE            the run before it runs
    hpc-lbsgd submit RECIPE --nodes 4 --site SITE
]])
whatis("Name: hpc_lbsgd")
whatis("Version: @VERSION@")
whatis("Description: large-minibatch SGD on supercomputers: Horovod over MPI, DALI, Slurm")
family("hpc_lbsgd")
@CONFLICTS@
@PREREQUISITES@
prepend_path("PATH", pathJoin(@ENVIRONMENT@, "bin"))
setenv("HPC_LBSGD_ENVIRONMENT", @ENVIRONMENT@)
