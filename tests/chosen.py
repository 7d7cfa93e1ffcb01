"""Which tests are chosen, and of whom they ask."""


def quick(items):
    """Of each function the first item that is not marked slow."""
    first = {}
    for item in items:
        if item.get_closest_marker("slow") is None:
            first.setdefault(item.nodeid.split("[")[0], item)
    return list(first.values())


def asked(request, argument):
    """What the chosen tests of a module are asked of: the values of an argument.

    With `--quick` or `-k` a program of many members then has these alone.
    """
    return {
        item.callspec.params[argument]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }
