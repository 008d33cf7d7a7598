"""The keywords of JSON Schema that are enforced, and those that are refused; every other one is an annotation."""

from __future__ import annotations

SUBSCHEMA = ("items", "additionalProperties")
"""Keywords whose value is a schema."""

SUBSCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
"""Keywords whose value is a list of schemas."""

SUBSCHEMA_MAPS = ("properties", "patternProperties")
"""Keywords whose value maps names to schemas; definitions are reached by `$ref` alone."""

SUPPORTED = (
    *("type", "enum", "const", "$ref", "$defs", "definitions"),
    *SUBSCHEMA_LISTS,
    *("properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties"),
    *("items", "minItems", "maxItems"),
    *("minLength", "maxLength", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
)
"""Keywords that the text is held to."""

UNSUPPORTED = frozenset(
    (
        *("not", "if", "then", "else", "dependentSchemas", "dependentRequired", "dependencies"),
        *("uniqueItems", "contains", "minContains", "maxContains", "additionalItems", "unevaluatedItems"),
        *("propertyNames", "unevaluatedProperties"),
        *("$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor"),
    )
)
"""Keywords that restrict a value in a way that a grammar cannot."""

HARMLESS = {"uniqueItems": False, "$recursiveAnchor": False}
"""Values with which an unsupported keyword restricts nothing."""
