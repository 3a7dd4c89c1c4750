"""The `omni` command. Each subcommand is one module; heavy imports happen inside the commands."""
