"""One self-contained HTML page about a run: collected from its files, drawn, and written without script or network."""
