"""Pages over runs: one offline HTML file, no script, everything a model wrote escaped."""
