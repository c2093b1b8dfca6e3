from hpc_lbsgd.api import GlobalShuffle as GlobalShuffle
from hpc_lbsgd.api import Keyed as Keyed
from hpc_lbsgd.api import Loader as Loader
from hpc_lbsgd.api import NoiseScale as NoiseScale
from hpc_lbsgd.api import Part as Part
from hpc_lbsgd.api import RequestError as RequestError
from hpc_lbsgd.api import Run as Run
from hpc_lbsgd.api import RunError as RunError
from hpc_lbsgd.api import Schedule as Schedule
from hpc_lbsgd.api import Stage as Stage
from hpc_lbsgd.api import Step as Step
from hpc_lbsgd.api import Verdict as Verdict
from hpc_lbsgd.api import World as World
from hpc_lbsgd.api import close as close
from hpc_lbsgd.api import distribute as distribute
from hpc_lbsgd.api import evaluate as evaluate
from hpc_lbsgd.api import init as init
from hpc_lbsgd.api import load as load
from hpc_lbsgd.api import save as save

__version__: str
API: tuple[str, ...]
