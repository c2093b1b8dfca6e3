#%Module1.0
# For Environment Modules. `make module` fills in the names between @ signs.
proc ModulesHelp {} {
    puts stderr {hpc_lbsgd: large-minibatch SGD on supercomputers (Horovod over MPI, DALI, Slurm).

    hpc-lbsgd doctor                 what this machine and environment can do
    hpc-lbsgd plan RECIPE            the run before it runs
    hpc-lbsgd submit RECIPE --nodes 4 --site SITE
}
}
module-whatis {hpc_lbsgd @VERSION@: large-minibatch SGD on supercomputers: Horovod over MPI, DALI, Slurm}
conflict hpc_lbsgd
@CONFLICTS@
@PREREQUISITES@
prepend-path PATH [file join @ENVIRONMENT@ bin]
setenv HPC_LBSGD_ENVIRONMENT @ENVIRONMENT@
