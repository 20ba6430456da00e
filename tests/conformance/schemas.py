"""Introspection of either peer, with the names of types resolved, so that two can be compared."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


class Schema:
    """The answer to `query-qmp-schema`."""

    def __init__(self, entities: list[Json]) -> None:
        self._by_name = {entity["name"]: entity for entity in entities}
        assert len(self._by_name) == len(entities), "a name is there twice"

    def names(self, meta_type: str) -> set[str]:
        """Names of all commands, events, objects, ..."""
        return {name for name, one in self._by_name.items() if one["meta-type"] == meta_type}

    def find(self, name: str) -> Json:
        return self._by_name[name]

    def kind(self, name: str, depth: int = 3) -> Any:
        """A type with all types in it, as plain data; deeper than `depth` only its meta-type."""
        entity = self._by_name[name]
        match entity["meta-type"]:
            case "builtin":
                return entity["name"]
            case "enum":
                return {"enum": sorted(entity["values"])}
            case "array":
                return [self.kind(entity["element-type"], depth)]
            case "alternate":
                return {"alternate": sorted(str(self.kind(m["type"])) for m in entity["members"])}
        if depth == 0:
            return "object"
        return self._object(entity, depth - 1)

    def _object(self, entity: Json, depth: int) -> Json:
        members = {
            member["name"] + ("?" if "default" in member else ""): self.kind(member["type"], depth)
            for member in entity["members"]
        }
        if "tag" not in entity:
            return members
        cases = {one["case"]: self.kind(one["type"], depth) for one in entity["variants"]}
        return members | {"(tag)": entity["tag"], "(cases)": cases}

    def arguments(self, command: str) -> Any:
        """The arguments of a command, or what an event carries."""
        return self.kind(self._by_name[command]["arg-type"])

    def features_of_values(self, command: str) -> dict[str, list[str]]:
        """Of the values of enums anywhere in the arguments of a command, those that are marked."""
        marked: dict[str, list[str]] = {}
        names = [self._by_name[command]["arg-type"]]
        for name in names:
            entity = self._by_name[name]
            parts = entity.get("members", [])
            names += [part["type"] for part in parts if part.get("type") not in (None, *names)]
            names += [entity["element-type"]] if "element-type" in entity else []
            marked |= {part["name"]: part["features"] for part in parts if part.get("features")}
        return marked

    def answer(self, command: str) -> Any:
        """What a command answers."""
        return self.kind(self._by_name[command]["ret-type"])

    def check(self) -> None:
        """:raise AssertionError: something mentions a type that is not there."""
        for entity in self._by_name.values():
            mentioned = [entity.get("arg-type"), entity.get("ret-type"), entity.get("element-type")]
            for part in ("members", "variants"):
                mentioned += [one.get("type") for one in entity.get(part, [])]
            missing = [name for name in mentioned if name and name not in self._by_name]
            assert not missing, (entity["name"], missing)
