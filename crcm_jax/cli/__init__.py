"""The subcommands of `crcm`, one module each: `HELP` (one line), `EXAMPLE` (a command) and `main(argv)`."""
