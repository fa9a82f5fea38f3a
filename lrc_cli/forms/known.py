"""Every form is found here by its name."""

from torch import Tensor

from lrc_cli.forms.form import DENSE, WEIGHT, Form, Packed
from lrc_cli.forms.low_rank import Interpolative, TwoFactors


class Dense(Form):
    """Stores W itself."""

    name = DENSE
    tensors = (WEIGHT,)

    def dense(self, packed: Packed) -> Tensor:
        """Returns W, float64."""
        return packed.tensors[WEIGHT].double()


FORMS: dict[str, Form] = {form.name: form for form in (Dense(), TwoFactors(), Interpolative())}


def dense(packed: Packed) -> Tensor:
    """Returns the matrix (m, n) that packed tensors stand for, float64."""
    return FORMS[packed.form].dense(packed)
