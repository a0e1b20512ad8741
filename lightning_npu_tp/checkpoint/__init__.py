"""Training state on disk: whole or not at all, checked, loadable into any layout."""
