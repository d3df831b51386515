"""How much one document may ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from flask import g
from graphql import (
    DocumentNode,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLError,
    GraphQLSchema,
    InlineFragmentNode,
    KnownFragmentNamesRule,
    NoFragmentCyclesRule,
    OperationDefinitionNode,
    SelectionSetNode,
    validate,
)
from strawberry.extensions import (
    DisableIntrospection,
    MaxAliasesLimiter,
    MaxTokensLimiter,
    QueryDepthLimiter,
    SchemaExtension,
)

from webapp.config import Settings
from webapp.errors import Invalid

NESTED_LIST_LIMIT: Final = 200
"""Lists within lists that one document may ask for: one of each conversation of the longest page."""


def limits(settings: Settings) -> list[Callable[[], SchemaExtension]]:
    """The limits of the settings, made anew for each request."""
    made: list[Callable[[], SchemaExtension]] = [
        lambda: MaxTokensLimiter(max_token_count=settings.graphql_token_limit),
        lambda: MaxFieldsLimiter(settings.graphql_token_limit),
        OneOperation,
        lambda: QueryDepthLimiter(max_depth=settings.graphql_depth_limit),
        lambda: MaxAliasesLimiter(max_alias_count=settings.graphql_alias_limit),
    ]
    return made if settings.graphql_introspection else [*made, DisableIntrospection]


def take_nested_list() -> None:
    """Count a list that is asked for each of many: a short document may otherwise mean thousands of queries.

    Raises:
        Invalid: it is one too many.
    """
    g.nested_lists = g.get("nested_lists", 0) + 1
    if g.nested_lists > NESTED_LIST_LIMIT:
        raise Invalid(f"The document asks for more than {NESTED_LIST_LIMIT} nested lists; ask for fewer at a time")


class OneOperation(SchemaExtension):
    """Which of several operations is meant has to be said (GraphQL, section 6.1)."""

    def on_validate(self) -> Iterator[None]:
        context = self.execution_context
        definitions = context.graphql_document.definitions if context.graphql_document else ()
        count = sum(isinstance(one, OperationDefinitionNode) for one in definitions)
        if count > 1 and not context._provided_operation_name:
            error = GraphQLError("operationName must name one of the document's operations")
            context.pre_execution_errors = [*(context.pre_execution_errors or ()), error]
        yield


class MaxFieldsLimiter(SchemaExtension):
    """Counts fields with every fragment written out, before anything walks through them that way.

    Fragments that spread others twice double at each step: a hundred of them are a short document, and more fields
    than could ever be counted one by one, which is what the limits on depth and aliases do.
    """

    def __init__(self, max_field_count: int) -> None:
        self._max_field_count = max_field_count

    def on_validate(self) -> Iterator[None]:
        """Errors that are found here keep the other rules from being tried."""
        context = self.execution_context
        if context.graphql_document is not None:
            context.pre_execution_errors = self._errors(context.schema._schema, context.graphql_document) or None
        yield

    def _errors(self, schema: GraphQLSchema, document: DocumentNode) -> list[GraphQLError]:
        errors = validate(schema, document, [KnownFragmentNamesRule, NoFragmentCyclesRule])
        if not errors and _field_count(document) > self._max_field_count:
            errors = [GraphQLError(f"The document asks for more than {self._max_field_count} fields")]
        return errors


def _field_count(document: DocumentNode) -> int:
    """Of all operations; the fragments must be known and without cycles."""
    fragments = {one.name.value: one for one in document.definitions if isinstance(one, FragmentDefinitionNode)}
    counted: dict[str, int] = {}

    def of_fragment(name: str) -> int:
        if name not in counted:
            counted[name] = of_selections(fragments[name].selection_set)
        return counted[name]

    def of_selections(selections: SelectionSetNode | None) -> int:
        total = 0
        for one in selections.selections if selections else ():
            if isinstance(one, FragmentSpreadNode):
                total += of_fragment(one.name.value)
            elif isinstance(one, FieldNode | InlineFragmentNode):
                total += isinstance(one, FieldNode) + of_selections(one.selection_set)
        return total

    operations = [one for one in document.definitions if isinstance(one, OperationDefinitionNode)]
    return sum(of_selections(one.selection_set) for one in operations)
