"""Goes with the re-exports: `study` reads the code of a module by this name until it is split."""
