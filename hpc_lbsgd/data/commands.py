"""The commands of `data`: parse, call, print."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from hpc_lbsgd.arguments import add_command, not_negative, positive, positive_float, quality, with_json, with_set
from hpc_lbsgd.errors import EXIT_DONE, EXIT_FAILED, RequestError
from hpc_lbsgd.urls import checked, is_url

OWN = re.compile(r"[\w.]+:\w+")  # a function, as recipes name them


def add(commands) -> None:
    """Add `data` to the top level's commands."""
    p = add_command(commands, "data", help="get, list and check a data set; print who gets which sample")
    data = p.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    p = add_command(data, "fetch", help="get a data set by name, as image files with a manifest")
    p.add_argument("name", choices=["cifar10", "fashion-mnist"], help="which")
    p.add_argument("--out", type=Path, help="folder to write to (default: data/NAME)")
    p.add_argument(
        "--source",
        type=Path,
        help="the original files (a folder; cifar10: or the archive), for machines without network",
    )
    with_json(p).set_defaults(function=fetch)
    p = add_command(
        data, "index", help="list a data set in a manifest, decoding every image; nothing is copied",
        example="data index imagenet/val --labels val.csv --classes-of imagenet/train",
    )  # fmt: skip
    p.add_argument(
        "dir",
        type=place,
        help="DIR/CLASS/IMAGE tree; a tar, or a folder of tars (WebDataset, ILSVRC's); a table (.csv, .tsv, .jsonl, "
        ".parquet) with a row a sample",
    )
    p.add_argument("--out", type=Path, help="manifest file (default: DIR/manifest.arrow; beside a single tar or table)")
    p.add_argument("--labels", type=Path, help="images without folders of classes: a table with NAME,CLASS a line")
    p.add_argument("--ids", type=Path, help="--labels has numbers alone: NUMBER CLASS a line (default: its meta.mat)")
    p.add_argument("--classes-of", metavar="MANIFEST", help="number the classes as this manifest (the training set's)")
    p.add_argument(
        "--fields",
        metavar="A,B",
        type=names,
        help="of a table: columns to take (default: all of numbers); of tar files: what lies beside images. NAME:KIND "
        "for text, bytes, image, mask and boxes",
    )
    p.add_argument("--path-column", metavar="NAME", help="of a table: the column of images' paths (default: path ...)")
    p.add_argument("--root", type=Path, metavar="DIR", help="of a table: where its paths start (default: its folder)")
    p.add_argument(
        "--at", metavar="URL", type=address, help="of tar files: read them from there later; what is here is a copy"
    )
    p.add_argument("--exclude", action="store_true", help="leave out images that do not decode, and list them")
    p.add_argument("--processes", type=positive, help="decoding processes (default: one a core)")
    with_part(p)
    with_json(p).set_defaults(function=index)
    p = add_command(
        data, "pack", help="a data set as a few tar shards with an index; goes on where it was stopped",
        example="data pack imagenet/train imagenet/packed --jpeg 90 --short-side 256",
    )  # fmt: skip
    p.add_argument(
        "manifest", help="manifest, or the folder that has one; or package.module:function, a data.dataset of your own"
    )
    p.add_argument("out", type=Path, help="folder to write to")
    stored = p.add_mutually_exclusive_group()
    stored.add_argument("--jpeg", type=quality, metavar="QUALITY", help="re-encode as JPEG (1 to 95)")
    stored.add_argument("--raw", action="store_true", help="store pixels, uint8: fastest to read, largest")
    side = p.add_mutually_exclusive_group()
    side.add_argument("--short-side", type=positive, metavar="PX", help="scale larger images down to this shorter side")
    side.add_argument("--long-side", type=positive, metavar="PX", help="scale larger images down to this longer side")
    p.add_argument("--grey", action="store_true", help="with --jpeg or --raw: one channel")
    p.add_argument(
        "--upright", action="store_true", help="with --jpeg or --raw: turn pixels as EXIF's orientation says"
    )
    p.add_argument("--shard-mb", type=positive_float, default=256.0, help="size of a shard, MB (default: %(default)g)")
    p.add_argument("--processes", type=positive, help="packing processes (default: one a core)")
    with_part(p)
    with_json(p).set_defaults(function=pack)
    p = add_command(data, "verify", help="decode everything; list what is corrupt, odd or twice there")
    p.add_argument("data", help="manifest, the folder that has one, or a DIR/CLASS/IMAGE tree")
    p.add_argument(
        "--exclude", action="store_true", help="write exclude.txt: what cannot be used is left out from now on"
    )
    p.add_argument("--processes", type=positive, help="decoding processes (default: one a core)")
    with_json(p).set_defaults(function=verify)
    p = add_command(
        data, "show", help="look at samples by class as a model sees them, at counts and sizes",
        example="data show imagenet/train --png sheet.png --recipe goyal-resnet50",
    )  # fmt: skip
    p.add_argument("data", help="manifest, or the folder that has one")
    p.add_argument("--png", type=Path, metavar="FILE", help="one picture")
    p.add_argument("--html", type=Path, metavar="FILE", help="one page with all in it")
    p.add_argument("--recipe", help="crop, flip and scale as this recipe does (default: a recipe's defaults)")
    with_set(p)
    p.add_argument("--classes", type=positive, default=10, metavar="N", help="how many (default: %(default)s)")
    with_json(p).set_defaults(function=show)
    p = add_command(
        data, "order", help="which samples a worker gets in an epoch, in order",
        example="data order --samples 1000 --workers 4 --epoch 2 --worker 3",
    )  # fmt: skip
    p.add_argument("recipe", nargs="?", help="recipe; or give --samples, --workers and --samples-per-worker")
    with_set(p)
    p.add_argument("--samples", type=positive, help="samples of the set, N")
    p.add_argument("--workers", type=positive, help="workers, k")
    p.add_argument("--samples-per-worker", type=positive, help="n (default: the recipe's, else 32)")
    p.add_argument("--seed", type=int, help="default: the recipe's, else 0")
    p.add_argument("--last-batch", choices=["drop", "partial"], help="default: the recipe's, else partial")
    p.add_argument("--epoch", type=not_negative, default=0, help="from 0 (default: %(default)s)")
    p.add_argument("--worker", type=not_negative, default=0, help="from 0 (default: %(default)s)")
    with_json(p).set_defaults(function=order)


def place(text: str) -> Path | str:
    return text if is_url(text) else Path(text)


def address(text: str) -> str:
    if not is_url(text):
        raise argparse.ArgumentTypeError("must be an address, such as https://HOST/FOLDER")
    try:
        return checked(text, "--at")
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def names(text: str) -> list[str]:
    return text.split(",")


def with_part(p) -> None:
    words = "do part I of N alone (I from 0), as on one of N nodes; when all have ended, the same without --part"
    p.add_argument("--part", type=part, metavar="I/N", help=words)


def part(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text}: must be I/N, with I from 0 to N-1")
    return int(number), int(count)


def show_part(args, share, images: int) -> int:
    if args.json:
        print(json.dumps({"part": str(share), "images": images}))
    else:
        print(f"part {share}: {images} images; when all parts have ended, give the same command without --part")
    return EXIT_DONE


def show_manifests(args, manifests) -> int:
    from hpc_lbsgd.data.labels import doubts

    def turned(m) -> int:
        return sum(int((m.orientations[some] != 1).sum()) for some in m.looked_at(all_of_it=True))

    facts = [
        {
            "manifest": str(m.path),
            "samples": len(m),
            "classes": m.classes,
            "fields": {name: str(field) for name, field in m.fields.items()},
            "bytes": sum(int(m.sizes[some].sum()) for some in m.looked_at(all_of_it=True)),
            "fingerprint": m.fingerprint,
            "left_out": m.header.get("left_out", {}),
            "turned": 0 if m.orientations is None else turned(m),
            "doubts": [] if m.own else doubts(m.classes, m.labels),
        }
        for m in manifests
    ]
    if args.json:
        print(json.dumps({"manifests": facts}))
    else:
        for f in facts:
            names = ", ".join(f["classes"][:5]) + (" ..." if len(f["classes"]) > 5 else "")
            some = f" in {len(f['classes'])} classes ({names})" if names else ""
            what = "images" if "image" in f["fields"] else "samples"
            print(f"{f['manifest']}: {f['samples']} {what}{some}, {f['bytes'] / 1e6:.1f} MB")
            if own := [f"{name} ({kind})" for name, kind in f["fields"].items() if kind not in ("image", "class")]:
                print(f"  fields: {', '.join(own)}")
            if f["left_out"]:
                rest = sorted(f["left_out"].items(), key=lambda kind: -kind[1])
                print(f"  left out: {', '.join(f'{n} {what}' for what, n in rest[:10])}{' ...' * (len(rest) > 10)}")
            if f["turned"]:
                print(f"  {f['turned']} images are turned by EXIF's orientation (data.orientation = apply follows it)")
            for doubt in f["doubts"]:
                print(f"  WARNING: {doubt}")
    return EXIT_DONE


def fetch(args) -> int:
    from hpc_lbsgd.data import fetch as sources

    return show_manifests(args, sources.SOURCES[args.name](args.out or Path("data") / args.name, args.source))


def index(args) -> int:
    from hpc_lbsgd.data import archive, manifest, table, tree
    from hpc_lbsgd.data.find import find, moved, refuse_compressed
    from hpc_lbsgd.data.parts import ALL, Share

    if is_url(args.dir):
        raise RequestError(
            f"{args.dir}: every image is decoded while it is indexed: index where the tar files lie, with the manifest "
            "beside them, or index a copy with --at URL"
        )
    refuse_compressed(args.dir)
    if args.at and (table.is_table(args.dir) or not archive.is_archive(args.dir)):
        raise RequestError(f"--at is for tar files, and {args.dir} has none")
    share = Share(*args.part) if args.part else ALL
    like = manifest.Manifest(find(args.classes_of)) if args.classes_of else None
    classes = like and like.classes
    of_tables = {"--path-column": args.path_column, "--root": args.root}
    if table.is_table(args.dir):
        if args.labels or args.ids:
            raise RequestError(
                f"--labels and --ids are for images without a table; {args.dir} is one, with a column class"
            )
        found = table.index(args.dir, args.out, args.processes, args.root, args.fields, args.path_column, like,
                            args.exclude, share)  # fmt: skip
        return show_manifests(args, [found]) if share.count == 1 else show_part(args, share, found)
    if wrong := next((option for option, value in of_tables.items() if value), None):
        raise RequestError(f"{wrong} is for tables, and {args.dir} is none")
    if args.ids and not args.labels:
        raise RequestError("--ids says what the numbers of a list mean: give the list with --labels")
    if not (args.out or args.labels) and (parts := tree.parts_of(args.dir)):
        made = []
        for folder in parts:
            made.append(tree.index(folder, None, args.processes, None, classes, args.exclude, share=share))
            classes = made[0].classes if share.count == 1 else None
        return show_manifests(args, made) if share.count == 1 else show_part(args, share, sum(made))
    asked = args.dir, args.out, args.processes, args.labels, classes, args.exclude, args.ids, share
    if archive.is_archive(args.dir):
        found = archive.index(*asked, args.fields, like.floats if like else ())
    elif args.fields:
        raise RequestError(f"--fields is for tables and tar files, and {args.dir} is neither")
    else:
        found = tree.index(*asked)
    if args.at and share.count == 1:
        found = moved(found, args.at)
    return show_manifests(args, [found]) if share.count == 1 else show_part(args, share, found)


def pack(args) -> int:
    from hpc_lbsgd.data import pack as packs
    from hpc_lbsgd.data import shards
    from hpc_lbsgd.data.parts import Share

    if OWN.fullmatch(args.manifest) and not Path(args.manifest).exists():
        from hpc_lbsgd.data.own import Own  # torch: seconds

        if args.raw or args.jpeg or args.short_side or args.long_side or args.grey or args.upright:
            raise RequestError(f"{args.manifest}: samples of your own are packed as they are: no option for images")
        packed = [(Own(args.manifest, part), args.out / part) for part in ("train", "eval")]
        args.out.mkdir(parents=True, exist_ok=True)
    else:
        kind = "raw" if args.raw else "jpeg" if args.jpeg else "keep"
        encoding = packs.Encoding(
            kind, args.short_side, args.long_side, args.jpeg or 90, 1 if args.grey else 3, args.upright
        )
        packed = [(packs.Images(args.manifest, encoding), args.out)]
    how = args.shard_mb, args.processes
    if args.part:
        share = Share(*args.part)
        return show_part(args, share, sum(shards.pack_share(c, out, *how, share) for c, out in packed))
    return show_manifests(args, [shards.pack(c, out, *how) for c, out in packed])


def verify(args) -> int:
    from hpc_lbsgd.data import verify as verifies

    if args.exclude and is_url(args.data):
        raise RequestError(f"--exclude writes a file beside a manifest, and {args.data} is not of this machine")
    found = verifies.verify(args.data, args.processes)
    excluded = verifies.write_excluded(found) if args.exclude else None
    print(json.dumps(verifies.as_json(found, excluded)) if args.json else verifies.show(found, excluded))
    return EXIT_FAILED if found.damaged or (found.unusable and not args.exclude) else EXIT_DONE


def show(args) -> int:
    from hpc_lbsgd import recipe as recipes

    if not (args.png or args.html):
        raise RequestError("data show: say where to write, with --png FILE or --html FILE")
    if args.settings and not args.recipe:
        raise RequestError("--set changes a recipe: name one with --recipe")
    recipe = recipes.read(args.recipe, args.settings) if args.recipe else None

    from hpc_lbsgd.data import show as shows  # matplotlib and torch: seconds

    data, seed = (recipe.data, recipe.seed) if recipe else (None, 0)
    shown = shows.show(args.data, data, seed, args.classes, args.png, args.html)
    written = [str(path) for path in (args.png, args.html) if path]
    print(json.dumps({"written": written, "samples": shown.samples.tolist()}) if args.json else "\n".join(written))
    return EXIT_DONE


def order(args) -> int:
    from hpc_lbsgd.data import who

    found = who.order(
        args.recipe,
        args.settings,
        args.samples,
        args.workers,
        args.samples_per_worker,
        args.seed,
        args.last_batch,
        args.epoch,
        args.worker,
    )
    if args.json:
        print(json.dumps(found))
    else:
        for step, samples in enumerate(found["steps"]):
            print(f"{step:6d}  {' '.join(map(str, samples))}")
    return EXIT_DONE
