"""What torch's compiler asks of a GPU, counted without one, for `gpu_model.count`: the graphs that it would be given,
forward and backward, fall into kernels by the rule that it goes by.

Products and pools are kernels of their own. Everything element by element is computed where it is wanted, again if
need be, and is written only where a product wants it, it leaves the graph, or several want what comes from many. A
reduction is a kernel, with what follows of its few results; those over the same elements are one. A kernel reads what
its elements come from, and writes what they become.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import _disable_current_modes

ALONE = {"convolution": 1, "convolution_backward": 2, "mm": 1, "addmm": 1, "max_pool2d_with_indices": 1,
         "max_pool2d_with_indices_backward": 1}  # fmt: skip
REDUCTIONS = {"sum", "mean", "var_mean"}
COMPILED = "compiled"
MANY = 4  # realize_reads_threshold of torch._inductor.config
KEPT = REDUCTIONS | set(ALONE)
VIEWS = {"view", "permute", "unsqueeze", "squeeze", "expand", "t", "slice", "select", "getitem", "detach", "alias"}


@dataclass
class Kernel:
    """name: of a product's or pool's operation, else COMPILED. elements: that it goes over."""

    name: str
    elements: int
    reads: set[torch.fx.Node]
    writes: list[torch.fx.Node]

    @property
    def launches(self) -> int:
        return ALONE.get(self.name, 1)

    @property
    def bytes(self) -> int:
        return sum(map(bytes_of, self.reads)) + sum(map(bytes_of, self.writes))


def name_of(node: torch.fx.Node) -> str:
    return getattr(node.target, "_opname", getattr(node.target, "__name__", str(node.target)))


def values(node: torch.fx.Node) -> list[torch.Tensor]:
    found = node.meta.get("val")
    return [v for v in (found if isinstance(found, tuple | list) else [found]) if isinstance(v, torch.Tensor)]


def bytes_of(node: torch.fx.Node) -> int:
    return sum(v.numel() * v.element_size() for v in values(node))


def kernels(graph: torch.fx.Graph) -> list[Kernel]:
    """Of one graph."""

    def lies_in(node: torch.fx.Node) -> torch.fx.Node:
        return lies_in(node.all_input_nodes[0]) if node.op == "call_function" and name_of(node) in VIEWS else node

    whole = {n for n in graph.nodes if n.op == "placeholder" or n.op == "call_function" and name_of(n) in KEPT}
    for node in graph.nodes:
        if node.op == "output" or node.op == "call_function" and name_of(node) in ALONE:
            whole |= {lies_in(source) for source in node.all_input_nodes}

    def comes_from(node: torch.fx.Node, found: set) -> set:
        for source in node.all_input_nodes:
            if source in whole:
                found.add(source)
            elif source not in found:
                comes_from(source, found)
        return found

    for node in graph.nodes:
        if len(node.users) > 1 and node not in whole and len(comes_from(node, set())) > MANY:
            whole.add(lies_in(node))

    made: list[Kernel] = []
    for node in graph.nodes:
        if node not in whole or node.op != "call_function":
            continue
        reads = {n for n in comes_from(node, set()) if values(n)}
        if name_of(node) in ALONE:
            made.append(Kernel(name_of(node), 0, reads, [node]))
            continue
        elements = max(v.numel() for n in [node, *node.all_input_nodes] for v in values(n))
        home = next((k for k in made if joins(k, node, reads, elements)), None)
        if home:
            home.reads |= reads - set(home.writes)
            home.writes.append(node)
        else:
            made.append(Kernel(COMPILED, elements, reads, [node]))
    return made


def joins(kernel: Kernel, node: torch.fx.Node, reads: set, elements: int) -> bool:
    """Whether what makes `node` of `reads` is part of another kernel, which reads the same."""
    if kernel.name != COMPILED:
        return False
    its = [name_of(n) in REDUCTIONS for n in kernel.writes]
    if name_of(node) not in REDUCTIONS:
        if any(its):  # what follows of its few results, and of what the graph was given
            follows = reads & set(kernel.writes)
            few = elements <= max(v.numel() for n in follows for v in values(n)) * 2 if follows else False
            return few and all(n.op == "placeholder" for n in reads - follows)
        return kernel.elements == elements and reads <= kernel.reads | set(kernel.writes)

    def large(found: set) -> set:
        return {n for n in found if max(v.numel() for v in values(n)) == elements}

    mine, others = large(reads), large(kernel.reads)
    return any(its) and kernel.elements == elements and bool(mine) and (mine <= others or others <= mine)


class Fused:
    """In the place of `torch.compile`, while it is entered. add(name, launches, bytes): a kernel ran."""

    def __init__(self, add: Callable[[str, int, int], None]):
        self.add, self.compile = add, torch.compile

    def __enter__(self) -> Fused:
        torch._dynamo.reset()
        torch.compile = self.compiled
        return self

    def __exit__(self, *problem) -> None:
        torch.compile = self.compile

    def compiled(self, function: Callable, **named) -> Callable:
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.partitioners import min_cut_rematerialization_partition
        from torch._inductor.decomposition import select_decomp_table

        backend = aot_autograd(
            fw_compiler=self._graph,
            bw_compiler=self._graph,
            decompositions=select_decomp_table,
            partition_fn=min_cut_rematerialization_partition,
        )
        made = self.compile(function, backend=backend, **named)

        def call(*args):
            with _disable_current_modes():
                return made(*args)

        return call

    def _graph(self, module: torch.fx.GraphModule, inputs) -> Callable:
        found = [(kernel.name, kernel.launches, kernel.bytes) for kernel in kernels(module.graph)]

        def run(args):
            for kernel in found:
                self.add(*kernel)
            with _disable_current_modes():
                return module.forward(*args)

        run._boxed_call = True
        return run
