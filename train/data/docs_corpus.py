"""docs."""


class DocsSource:
    fingerprint = "todo"

    def units(self, cache_dir, workers):
        return []
