"""The ``ckmerge`` commands. Nothing heavy is imported before a command needs it."""
