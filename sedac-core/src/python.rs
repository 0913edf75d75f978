//! The whole Python border: arguments in, errors to `ValueError`, the GIL released around the work.

use ndarray::ArrayView2;
use numpy::{PyArray1, PyArrayMethods, PyReadonlyArray2};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::Error;
use crate::accumulator::{self, Outcome, Risk, Rule};

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        PyValueError::new_err(error.to_string())
    }
}

/// Risks `[checkpoints, tokens]` in any of the element types we read without a copy.
#[derive(FromPyObject)]
enum Risks<'py> {
    Float(PyReadonlyArray2<'py, f32>),
    Half(PyReadonlyArray2<'py, half::f16>),
    Brain(PyReadonlyArray2<'py, u16>),
}

type Evaluated<'py> = (Bound<'py, PyArray1<i32>>, Bound<'py, PyArray1<f32>>);

fn evaluate_typed<'py, R: Risk>(py: Python<'py>, rule: &Rule, risks: ArrayView2<'_, R>) -> PyResult<Evaluated<'py>> {
    let tokens = risks.dim().1;
    let exits = PyArray1::<i32>::zeros(py, tokens, false);
    let confidence = PyArray1::<f32>::zeros(py, tokens, false);
    {
        let (mut exits, mut confidence) = (exits.readwrite(), confidence.readwrite());
        let (e, c) = (exits.as_slice_mut()?, confidence.as_slice_mut()?);
        py.detach(|| accumulator::evaluate(rule, risks, Outcome { exit_checkpoint: e, confidence: c, width: &mut [] }))?;
    }
    Ok((exits, confidence))
}

#[pyfunction]
#[pyo3(signature = (risks, thresholds, weights=None, gamma=0.0, level=0.5))]
fn evaluate<'py>(
    py: Python<'py>,
    risks: Risks<'py>,
    thresholds: Vec<f32>,
    weights: Option<Vec<f32>>,
    gamma: f32,
    level: f32,
) -> PyResult<Evaluated<'py>> {
    let weights = weights.unwrap_or_else(|| vec![1.0; thresholds.len()]);
    let rule = Rule::new(thresholds, weights, gamma, level)?;
    match &risks {
        Risks::Float(risks) => evaluate_typed(py, &rule, risks.as_array()),
        Risks::Half(risks) => evaluate_typed(py, &rule, risks.as_array()),
        Risks::Brain(risks) => evaluate_typed(py, &rule, risks.as_array()),
    }
}

#[pymodule(gil_used = true)]
mod _rust {
    #[pymodule_export]
    use super::evaluate;
}
