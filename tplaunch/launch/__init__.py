"""Starting the workers: `torchrun` says how, `local` runs them here, `console` shows how it goes. No torch."""
