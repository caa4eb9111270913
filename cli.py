"""The command line from a checkout, installed or not: python cli.py generate …"""

from pathlib import Path

import mlx_gemma3

# convert/ lies beside the package here, and in it where it is installed.
mlx_gemma3.__path__.append(str(Path(__file__).resolve().parent))

if __name__ == "__main__":
    from mlx_gemma3.cli import main

    main()
