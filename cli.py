"""The command line from a checkout: python cli.py generate …"""

from mlx_gemma3.cli import main

if __name__ == "__main__":
    main()
