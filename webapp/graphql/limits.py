"""How much one document may ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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


def limits(settings: Settings) -> list[Callable[[], SchemaExtension]]:
    """The limits of the settings, made anew for each request."""
    made: list[Callable[[], SchemaExtension]] = [
        lambda: MaxTokensLimiter(max_token_count=settings.graphql_token_limit),
        lambda: MaxFieldsLimiter(settings.graphql_token_limit),
        lambda: QueryDepthLimiter(max_depth=settings.graphql_depth_limit),
        lambda: MaxAliasesLimiter(max_alias_count=settings.graphql_alias_limit),
    ]
    return made if settings.graphql_introspection else [*made, DisableIntrospection]


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
