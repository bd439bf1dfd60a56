"""`bitblas cache`: what the store of compiled operators holds, whether it is whole, what of it goes, and bundles of it."""

from __future__ import annotations

import argparse
import datetime
import json
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import env
from ..config import DEFAULT_BUCKETS
from ..errors import ArgumentError, ArtifactError, BitBLASError
from .operators import add_attention_options, add_matmul_options, attention_of, check_no_matmul, matmul_of

if TYPE_CHECKING:
    from ..cache.inventory import Inventory, Operator
    from ..config import MatmulConfig
    from ..target import Target

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SHORT = 12  # digits of a key that are shown
_STATUS = "exit status: 0; 1 where verify has found damage; 2 for what cannot be done; 130 when interrupted"


def add_command(commands: Any) -> None:
    """Add the verb to a parser's commands."""
    cache = commands.add_parser(
        "cache", help="look after compiled operators, and take them to other machines", epilog=_STATUS
    )
    verbs = cache.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str, *, tells: bool = True) -> Any:
        parser = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=_STATUS)
        if tells:
            parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(run=_guarded(run))
        return parser

    verb("path", _path, "print the directory (BITBLAS_CACHE_DIR)", tells=False)
    verb("list", _list, "list the operators and what else there is")
    verify = verb("verify", _verify, "compare every file with its checksum")
    verify.add_argument("--repair", action="store_true", help="set aside what is damaged, to be built again")
    _add_prune_options(verb("prune", _prune, "remove what is old, large, stale or left behind"))
    _add_export_options(verb("export", _export, "put operators into a bundle, for machines that cannot compile"))
    taken = verb("import", _import, "take the operators of a bundle")
    taken.add_argument("bundle", type=Path, metavar="BUNDLE", help="a file that export wrote")


def _add_prune_options(prune: Any) -> None:
    prune.add_argument(
        "--older-than", type=_days, metavar="DAYS", help="operators that were neither built nor used since"
    )
    prune.add_argument(
        "--max-size", type=_size, metavar="SIZE", help="the longest unused, until the rest is as small: 500M, 2G"
    )
    prune.add_argument("--stale", action="store_true", help="what was made by other versions of bitblas or TVM")
    prune.add_argument("--quarantine", action="store_true", help="damaged entries that were set aside")
    prune.add_argument("--staging", action="store_true", help="what killed builds have left")
    prune.add_argument("--failed", action="store_true", help="failed builds that were kept (BITBLAS_KEEP_BUILD)")
    prune.add_argument("--all", action="store_true", help="everything, tuning records too")
    prune.add_argument("--dry-run", action="store_true", help="remove nothing, and say what would be")


def _add_export_options(export: Any) -> None:
    export.add_argument("bundle", type=Path, metavar="OUT.tar", help="the file to write")
    export.add_argument(
        "--model", type=Path, metavar="FOLDER", help="the operators of a model that `bitblas repack` wrote"
    )
    export.add_argument("--all", action="store_true", help="all operators of the store, or those for --target")
    export.add_argument(
        "--target", nargs="+", metavar="T", help="what to compile for (BITBLAS_TARGET, else this machine)"
    )
    one = export.add_argument_group("one operator", "--M and --A-dtype are for the layers of a model, too")
    add_matmul_options(one, " ".join(map(str, DEFAULT_BUCKETS)), "")
    add_attention_options(export)


def _days(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: it must be a number of days, 0 or more")
    return value


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed: give bytes, or a number with K, M, G or T, such as 500M"
        )
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _guarded(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Make an error of the operating system a line, as those of bitblas are."""

    def guarded(options: argparse.Namespace) -> int:
        try:
            return run(options)
        except BrokenPipeError:
            raise
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise ArtifactError(f"{where}{error.strerror or error}") from error

    return guarded


def _print_json(values: object) -> int:
    print(json.dumps(values, indent=1))
    return 0


# -- looking ---------------------------------------------------------------------------------------------------------------


def _path(options: argparse.Namespace) -> int:
    print(env.CACHE_DIR.get())
    return 0


def _list(options: argparse.Namespace) -> int:
    from ..cache.inventory import take_inventory

    inventory = take_inventory(env.CACHE_DIR.get())
    if options.json:
        return _print_json(_as_json(inventory))
    whole = [row for row in inventory.operators if not row.entry.damage]
    for target in dict.fromkeys(row.target for row in whole):
        rows = [row for row in whole if row.target == target]
        runs = {True: "this machine can run it", False: "this machine cannot run it", None: ""}[rows[0].runs]
        print(f"{target or 'target unknown'}{f' ({runs})' if runs else ''}")
        _print_operators(rows)
        print()
    _print_damage(inventory)
    _print_totals(inventory)
    return 0


def _print_operators(rows: list[Operator]) -> None:
    table = [["key", "size", "built", "used", "tilings", "operator"]]
    for row in rows:
        used = "-" if row.entry.used is None else _day(row.entry.used)
        other = "" if row.usable else "by other versions: "
        size = f"{row.entry.size / 1e3:.0f} kB"
        words = other + (row.config or "config unknown")
        table.append([row.entry.key[:_SHORT], size, _day(row.entry.built), used, row.tilings or "?", words])
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]) - 1)]
    for key, size, *cells, words in table:
        shown = [f"{text:{width}}" for text, width in zip(cells, widths[2:], strict=True)]
        print("  " + "  ".join([f"{key:{widths[0]}}", f"{size:>{widths[1]}}", *shown, words]))


def _print_damage(inventory: Inventory) -> None:
    for what, path, problem in inventory.damaged:
        print(f"damaged {what} {path}: {problem}")


def _print_totals(inventory: Inventory) -> None:
    counts = Counter(row.kind for row in inventory.records)
    stale = [row for row in inventory.operators if not row.usable and not row.entry.damage]
    print(f"{inventory.root}: {_count(len(inventory.operators), 'operator')}, {_megabytes(inventory.size)} in all")
    print(f"{_count(counts['operators'], 'saved operator')} in the index, {_count(counts['tuning'], 'tuning record')}")
    if inventory.damaged:
        print(f"{_count(len(inventory.damaged), 'entry')} damaged: `bitblas cache verify --repair` sets that aside")
    if stale:
        size = _megabytes(sum(row.entry.size for row in stale))
        print(f"{_count(len(stale), 'operator')} by other versions, {size}: `bitblas cache prune --stale` removes them")
    for kind, number in sorted(Counter(row.kind for row in inventory.leftovers).items()):
        size = _megabytes(sum(row.size for row in inventory.leftovers if row.kind == kind))
        print(f"{number} in {kind}, {size}: `bitblas cache prune --{kind}` removes what is not in use")


def _as_json(inventory: Inventory) -> dict[str, object]:
    counts = Counter(row.kind for row in inventory.records)
    return {
        "root": str(inventory.root),
        "size": inventory.size,
        "operators": [_operator_as_json(row) for row in inventory.operators],
        "saved": counts["operators"],
        "tuning": counts["tuning"],
        "damaged": _damage_as_json(inventory),
        "leftovers": [{"kind": row.kind, "path": str(row.path), "size": row.size} for row in inventory.leftovers],
    }


def _operator_as_json(row: Operator) -> dict[str, object]:
    entry = row.entry
    plan = entry.manifest.get("plan") or {}
    return {
        "key": entry.key,
        "path": str(entry.path),
        "operator": row.config,
        "config": plan.get("config"),
        "target": row.target,
        "size": entry.size,
        "built": _stamp(entry.built),
        "used": None if entry.used is None else _stamp(entry.used),
        "runs": row.runs,
        "tilings": row.tilings,
        "usable": row.usable,
        "damage": entry.damage,
    }


def _damage_as_json(inventory: Inventory) -> list[dict[str, str]]:
    return [{"kind": what, "path": str(path), "problem": problem} for what, path, problem in inventory.damaged]


def _verify(options: argparse.Namespace) -> int:
    from ..cache.inventory import take_inventory
    from ..cache.pruning import repair

    inventory = take_inventory(env.CACHE_DIR.get(), verify=True)
    repaired = repair(inventory) if options.repair else []
    checked = len(inventory.operators) + len(inventory.records)
    if options.json:
        aside = [{"kind": what, "path": str(path)} for what, path in repaired]
        found = {
            "root": str(inventory.root),
            "checked": checked,
            "damaged": _damage_as_json(inventory),
            "set_aside": aside,
        }
        _print_json(found)
    else:
        _print_damage(inventory)
        for what, path in repaired:
            print(f"set aside: {what} {path}")
        print(f"{inventory.root}: {_count(checked, 'entry')} verified, {len(inventory.damaged)} damaged")
    return 1 if inventory.damaged else 0


# -- removing --------------------------------------------------------------------------------------------------------------


def _prune(options: argparse.Namespace) -> int:
    from ..cache.pruning import Criteria, prune

    kinds = (options.stale, options.quarantine, options.staging, options.failed, options.all)
    if options.older_than is None and options.max_size is None and not any(kinds):
        raise ArgumentError(
            "nothing says what to remove: give --older-than DAYS, --max-size SIZE, --stale, --quarantine, --staging, --failed "
            "or --all; --dry-run shows what it would be"
        )
    criteria = Criteria(options.older_than, options.max_size, *kinds)
    root = env.CACHE_DIR.get()
    pruned = prune(root, criteria, dry_run=options.dry_run)
    if options.json:
        removed = [{"kind": what, "path": str(path), "size": size} for what, path, size in pruned.removed]
        return _print_json({"root": str(root), "dry_run": options.dry_run, "freed": pruned.freed, "removed": removed})
    for what, path, size in pruned.removed:
        print(f"{what} {path}, {size / 1e3:.0f} kB")
    number = _count(len(pruned.removed), "entry")
    would = "would be removed, and free" if options.dry_run else "removed, and freed"
    print(f"{root}: {number} {would} {_megabytes(pruned.freed)}")
    return 0


# -- bundles ---------------------------------------------------------------------------------------------------------------


def _export(options: argparse.Namespace) -> int:
    from ..cache.bundle import export_bundle, export_store

    one, attention = options.N is not None and options.K is not None, attention_of(options)
    ways = (one, options.all, options.model is not None, attention is not None)
    if sum(map(bool, ways)) != 1 or (options.N is None) != (options.K is None):
        raise ArgumentError(
            "say what to export, one of: --model FOLDER, --all, --N and --K of an operator, or --attention DIM"
        )
    if options.all:
        check_no_matmul(options, (), "--all")
    if options.model is not None:
        check_no_matmul(options, ("M", "A_dtype"), "--model")
    targets = _targets(options)
    if options.all:
        exported = export_store(options.bundle, targets if options.target else ())
    else:
        exported = export_bundle(options.bundle, [attention] if attention else _configs_of(options, one), targets)
    if options.json:
        keys = [artifact.key for artifact in exported.operators]
        found = {"bundle": str(exported.path), "size": exported.size, "operators": keys, "left_out": exported.left_out}
        return _print_json({**found, "tuning": exported.tuning, "saved": exported.saved})
    print(
        f"{exported.path}: {_count(len(exported.operators), 'operator')}, {_count(exported.tuning, 'tuning record')}, "
        f"{_count(exported.saved, 'saved operator')}, {_megabytes(exported.size)}"
    )
    if exported.left_out:
        print(f"{_count(exported.left_out, 'operator')} left out: damaged, or made by other versions")
    print("elsewhere, with the same versions of bitblas and apache-tvm-ffi: bitblas cache import " + exported.path.name)
    return 0


def _targets(options: argparse.Namespace) -> list[Target]:
    from ..target import resolve_target

    return list({resolve_target(name): None for name in options.target or [None]})


def _configs_of(options: argparse.Namespace, one: bool) -> list[MatmulConfig]:
    """Of one operator, or of the layers of a model."""
    if one:
        return [matmul_of(options)]
    from ..cache.models import configs_of_model

    return list(configs_of_model(options.model, options.A_dtype, options.M or DEFAULT_BUCKETS))


def _import(options: argparse.Namespace) -> int:
    from ..cache.importing import import_bundle
    from ..cache.inventory import can_run, target_of

    imported = import_bundle(options.bundle)
    targets = Counter(target_of(manifest["plan"]) for manifest in imported.manifests.values())
    here = _own_targets()
    found = [
        {"target": str(target), "operators": number, "runs": target is not None and can_run(target)}
        for target, number in targets.items()
    ]
    if options.json:
        counts = {"tuning": imported.tuning, "saved": imported.saved, "targets": found}
        return _print_json({"root": str(imported.root), "added": imported.added, "kept": imported.kept, **counts})
    print(
        f"{imported.root}: {_count(len(imported.added), 'operator')} added, {len(imported.kept)} there already; "
        f"{_count(imported.tuning, 'tuning record')}, {_count(imported.saved, 'saved operator')}"
    )
    for row in found:
        note = "" if row["target"] in here else f"; set BITBLAS_TARGET='{row['target']}' to use them here"
        note = "; this machine cannot run them" if row["runs"] is False else note
        print(f"{_count(int(str(row['operators'])), 'operator')} for {row['target']}{note}")
    return 0


def _own_targets() -> set[str]:
    """What operators are compiled for here that name no target, or this CPU."""
    from ..target import host_target, resolve_target

    found = set()
    for resolve in (resolve_target, host_target):
        with suppress(BitBLASError):
            found.add(str(resolve()))
    return found


# -- words -----------------------------------------------------------------------------------------------------------------


def _count(number: int, what: str) -> str:
    plural = f"{what.removesuffix('y')}ies" if what.endswith("y") else f"{what}s"
    return f"{number} {what if number == 1 else plural}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _stamp(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec="seconds")


def _day(seconds: float) -> str:
    return _stamp(seconds)[:10] if seconds else "-"
