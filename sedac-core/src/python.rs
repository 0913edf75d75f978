//! The whole Python border: arguments in, errors to `ValueError`, the GIL released around the work.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ndarray::ArrayView2;
use numpy::{PyArray1, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::accumulator::{self, Outcome, Risk, Rule};
use crate::error::{Error, check_shape, check_values};
use crate::{histogram, threshold};

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

/// Counts of risks in log-spaced bins.
#[pyclass(module = "sedac_core._rust")]
#[derive(Default)]
struct RiskHistogram(histogram::RiskHistogram);

#[pymethods]
impl RiskHistogram {
    #[classattr]
    const RELATIVE_ERROR: f32 = histogram::RELATIVE_ERROR;

    #[new]
    fn new() -> Self {
        Self::default()
    }

    fn add(&mut self, risks: PyReadonlyArray1<'_, f32>) {
        self.0.add(risks.as_array().iter().copied());
    }

    fn merge(&mut self, other: PyRef<'_, Self>) {
        self.0.merge(&other.0);
    }

    fn quantile(&self, share: f64) -> PyResult<f32> {
        if !(0.0..=1.0).contains(&share) {
            return Err(Error::Value { what: "share", found: share, expected: "between 0 and 1" }.into());
        }
        self.0.quantile(share).ok_or_else(|| PyValueError::new_err("an empty histogram has no quantiles"))
    }

    #[getter]
    fn total(&self) -> u64 {
        self.0.total()
    }

    #[getter]
    fn unusable(&self) -> u64 {
        self.0.unusable()
    }
}

/// Thresholds that follow target exit rates.
#[pyclass(module = "sedac_core._rust", frozen)]
struct ThresholdController {
    controller: Mutex<threshold::Controller>,
    published: Arc<threshold::Published>,
}

impl ThresholdController {
    fn controller(&self) -> MutexGuard<'_, threshold::Controller> {
        self.controller.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl ThresholdController {
    #[new]
    fn new(exit_rates: Vec<f32>, alpha: f32, window: u64, initial_thresholds: Vec<f32>) -> PyResult<Self> {
        let controller = threshold::Controller::new(&exit_rates, alpha, window, &initial_thresholds)?;
        Ok(Self { published: controller.published(), controller: Mutex::new(controller) })
    }

    fn observe(&self, checkpoint: usize, critical_thresholds: PyReadonlyArray1<'_, f32>) -> PyResult<()> {
        Ok(self.controller().observe(checkpoint, critical_thresholds.as_array().iter().copied())?)
    }

    fn update(&self) {
        self.controller().update();
    }

    fn thresholds(&self) -> Vec<f32> {
        let mut thresholds = vec![0.0; self.published.len()];
        self.published.load(&mut thresholds);
        thresholds
    }

    fn publish(&self, thresholds: Vec<f32>) -> PyResult<()> {
        check_shape("thresholds", &[thresholds.len()], &[self.published.len()])?;
        check_values("thresholds", &thresholds, |t| t >= 0.0, "from 0 to infinity")?;
        self.published.store(&thresholds);
        Ok(())
    }

    fn tokens(&self, checkpoint: usize) -> PyResult<u64> {
        Ok(self.controller().tokens(checkpoint)?.0)
    }

    fn unusable(&self, checkpoint: usize) -> PyResult<u64> {
        Ok(self.controller().tokens(checkpoint)?.1)
    }
}

#[pymodule(gil_used = true)]
mod _rust {
    #[pymodule_export]
    use super::{RiskHistogram, ThresholdController, evaluate};
}
