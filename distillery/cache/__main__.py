"""Check a cache: python -m distillery.cache verify DIR."""

import argparse
from pathlib import Path

from distillery.system.errors import run_command
from distillery.verify import verify_folder


def main() -> int:
    """python -m distillery.cache verify DIR: the same as python -m distillery.verify DIR."""
    parser = argparse.ArgumentParser(prog="python -m distillery.cache", description="Check a cache; reads only.")
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="compare every byte with the hashes; writes nothing")
    verify.add_argument("directory", type=Path, metavar="DIR", help="a cache_dir, or one of the folders below it")
    return verify_folder(parser.parse_args().directory)


if __name__ == "__main__":
    run_command(main)
