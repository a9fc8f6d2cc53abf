"""What the `evaluate` modules in the folders beside this file share: each calls a function of `hivilt.evaluation`.

`evaluate.load` copies the file of a module alone into its cache, so all that it needs is in the installed package.
"""

import inspect
import re
from abc import ABC, abstractmethod
from typing import Any

import datasets
import evaluate

ANSWER = datasets.Features(predictions=datasets.Value("string"), references=datasets.Value("string"))
ANSWERS = datasets.Features(
    predictions=datasets.Value("string"), references=datasets.Sequence(datasets.Value("string"))
)


# Abstract, since `evaluate.load` picks the first class of a file that is not.
class FunctionMetric(evaluate.Metric, ABC):
    """A metric that calls `function` with predictions, references and options.

    A subclass states `function`, `citation`, a paper that ends with its address, and `features` unless they are a text each.
    Its docstring is the description and, after a blank line, an example; the docstring of `function` describes the arguments.
    """

    features = ANSWER

    @staticmethod
    @abstractmethod
    def function(predictions: list, references: list, **options: Any) -> dict[str, Any]: ...

    def _info(self) -> evaluate.MetricInfo:
        description, _, example = inspect.getdoc(type(self)).partition("\n\n")
        arguments = inspect.getdoc(self.function).partition("\n\n>>> ")[0]  # its own example is not run here
        return evaluate.MetricInfo(
            description=description,
            citation=self.citation,
            inputs_description=f"\n{self._renamed(arguments)}\n\n{example}\n",
            features=self.features,
            reference_urls=[self.citation.split()[-1]],
        )

    def _compute(self, predictions: list, references: list, **options: Any) -> dict[str, Any]:
        try:
            return self.function(predictions, references, **options)
        except (TypeError, ValueError) as error:
            raise type(error)(self._renamed(str(error))) from error

    def _renamed(self, text: str) -> str:
        """What the function says of its first two arguments, by their names here."""
        names = list(inspect.signature(self.function).parameters)
        for name, here in zip(names, ("predictions", "references"), strict=False):
            text = re.sub(rf"\b{name}(?=`|:|, \w+:)", here, text)
        return text
