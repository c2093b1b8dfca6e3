"""`evaluate`, `predict`, `export` and `audit`: parse, call, print."""

from __future__ import annotations

import json
from pathlib import Path

from hpc_lbsgd.arguments import not_negative, positive, with_json, with_set
from hpc_lbsgd.errors import EXIT_DONE, EXIT_FAILED
from hpc_lbsgd.records import metrics_of


def add(command) -> None:
    """Add them to the top level's commands."""
    p = with_trained(command("evaluate", evaluate, help="loss and accuracy of a run on its own or other data"))
    p.add_argument("data", nargs="?", help="manifest, or the folder that has one (default: the recipe's data.eval)")
    with_json(p)
    p = with_trained(command("predict", predict, help="classes of image files, by a run's model"))
    p.add_argument("images", nargs="+", help="image files, or folders of them")
    p.add_argument("--top", type=positive, default=1, help="classes an image, the likeliest first (default: 1)")
    with_json(p)
    p = with_trained(command("export", export, help="a run's model for other programs, read back and compared"))
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="FILE.pt: state dict; .safetensors; .pt2: torch.export, model and weights; .onnx",
    )
    with_json(p)
    p = command("audit", audit, help="steps that a run has taken, again: do they come out as they are on record?",
                example="audit runs/first --steps 5")  # fmt: skip
    p.add_argument("run", help="run folder; it is read, and nothing else")
    with_set(p)
    p.add_argument("--from", type=not_negative, dest="start", metavar="STEP",
                   help="checkpoint of this step; 0: its start (default: the newest that steps follow)")  # fmt: skip
    p.add_argument(
        "--steps", type=positive, default=20, help="at most so many; fewer, to end at a checkpoint (default: 20)"
    )
    with_json(p)


def with_trained(p):
    p.add_argument("run", help="run folder")
    p.add_argument(
        "--at", default="newest", metavar="WHICH", help="checkpoint: newest, best, or a step (default: newest)"
    )
    p.add_argument(
        "--plain", action="store_true", help="the weights themselves, where the recipe averages them (train.ema_decay)"
    )
    return p


def evaluate(args) -> int:
    from hpc_lbsgd.trained import evaluate as evaluates

    found = evaluates.evaluate(args.run, args.data, args.at, args.plain)
    if found is None:
        return EXIT_DONE
    if args.json:
        print(json.dumps(found))
    else:
        accuracy = "" if found["accuracy"] is None else f", accuracy {found['accuracy']:.2%}"
        averaged = ", averaged weights" if found["averaged"] else ""
        print(f"{found['run']}, step {found['step']}{averaged}, on {found['data']}:")
        own = "".join(f", {name} {value:.4g}" for name, value in metrics_of(found).items())
        print(f"  loss {found['loss']:.4f}{accuracy}{own}, {found['samples']} samples")
    return EXIT_DONE


def predict(args) -> int:
    from hpc_lbsgd.trained import predict as predicts
    from hpc_lbsgd.trained.opened import open_run

    paths = predicts.images_of(args.images)
    found = open_run(args.run, args.at, args.plain)
    made = []
    for p in predicts.predict(found, paths, args.top):
        made.append(p)
        if not args.json:
            said = ", ".join(f"{name} {share:.1%}" for name, share in zip(p.classes, p.shares, strict=True))
            print(f"{p.path}: {p.problem or said}", flush=True)
    if args.json:
        print(json.dumps({"run": args.run, "step": found.step, "images": [p._asdict() for p in made]}))
    return EXIT_FAILED if any(p.problem for p in made) else EXIT_DONE


def export(args) -> int:
    from hpc_lbsgd.trained import export as exports
    from hpc_lbsgd.trained.opened import open_run

    found = open_run(args.run, args.at, args.plain)
    made = exports.export(found, args.out)
    if args.json:
        print(json.dumps(made))
    else:
        how = "weights equal to the bit" if made["largest_difference"] is None else "outputs differ by at most "
        how += "" if made["largest_difference"] is None else f"{made['largest_difference']:.1e}"
        print(f"{made['file']}: {found.said()}, {made['bytes'] / 1e6:.1f} MB; read back: {how}")
    return EXIT_DONE


def audit(args) -> int:
    from hpc_lbsgd.train.laps import kept_for_good

    with kept_for_good():
        from hpc_lbsgd.trained import audit as audits

    return audits.audit(args.run, args.start, args.steps, args.settings, args.json)
