//! The whole Python border: arguments in, errors to `ValueError`, the GIL released around the work.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ndarray::{Array2, Array3, Array4, ArrayView1, ArrayView2, Axis, Dimension, Ix1, Ix2};
use numpy::{
    Element, IntoPyArray, PyArray, PyArray1, PyArray2, PyArray3, PyArray4, PyArrayMethods, PyReadonlyArray,
    PyReadonlyArray2, PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::accumulator::{self, Outcome, Risk, Rule};
use crate::error::{Error, check_shape, check_values};
use crate::sweep::Grid;
use crate::{histogram, threshold};

/// Tokens from which letting other Python threads run is worth its 0.1 µs.
const DETACH_FROM: usize = 1024;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        PyValueError::new_err(error.to_string())
    }
}

/// A NumPy array of this type and number of dimensions, laid out so that Rust may read it: ndarray counts strides in
/// whole elements, which those of an unaligned array need not be.
struct Array<'py, T: Element, D: Dimension>(Bound<'py, PyArray<T, D>>);

impl<'py, T: Element, D: Dimension> FromPyObject<'_, 'py> for Array<'py, T, D> {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if let Some(array) = aligned(object) {
            return Ok(Self(array));
        }
        let expected = format!("array must be {} of {} dimensions", T::get_dtype(object.py()), D::NDIM.unwrap_or(0));
        Err(unexpected(&expected, object)?)
    }
}

fn read<'py, T: Element, D: Dimension>(array: &Bound<'py, PyArray<T, D>>) -> PyResult<PyReadonlyArray<'py, T, D>> {
    array.try_readonly().map_err(|_| PyValueError::new_err("an array cannot be read while another call writes it"))
}

fn aligned<'py, T: Element, D: Dimension>(object: Borrowed<'_, 'py, PyAny>) -> Option<Bound<'py, PyArray<T, D>>> {
    object.cast().ok().filter(|array| array.is_aligned()).map(Borrowed::to_owned)
}

/// The error for an object that is no such array.
fn unexpected(expected: &str, found: Borrowed<'_, '_, PyAny>) -> PyResult<PyErr> {
    let array = found.cast::<PyUntypedArray>()?;
    let unaligned = if array.is_aligned() { "" } else { "unaligned " };
    let (dtype, shape) = (array.dtype(), array.shape());
    Ok(PyValueError::new_err(format!("{expected}, found {unaligned}{dtype} {shape:?}")))
}

/// Risks `[checkpoints, tokens]` in any of the element types that are read without a copy.
enum Risks<'py> {
    Float(PyReadonlyArray2<'py, f32>),
    Half(PyReadonlyArray2<'py, half::f16>),
    Brain(PyReadonlyArray2<'py, u16>),
}

impl<'py> FromPyObject<'_, 'py> for Risks<'py> {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let float = || aligned(object).map(|risks| read(&risks).map(Self::Float));
        let half = || aligned(object).map(|risks| read(&risks).map(Self::Half));
        let brain = || aligned(object).map(|risks| read(&risks).map(Self::Brain));
        let expected = "risks must be float32, float16 or uint16 (bits of bfloat16) of shape [checkpoints, tokens]";
        float().or_else(half).or_else(brain).unwrap_or_else(|| Err(unexpected(expected, object)?))
    }
}

/// Call `$work` with the view of whichever type the risks have.
macro_rules! with_risks {
    ($risks:expr, $view:ident => $work:expr) => { with_risks!($risks, $view => $work, Float Half Brain) };
    ($risks:expr, $view:ident => $work:expr, $($kind:ident)*) => {
        match &$risks {
            $(Risks::$kind(risks) => { let $view = risks.as_array(); $work })*
        }
    };
}

type Exits<'py> = Bound<'py, PyArray1<i32>>;
type Floats<'py> = Bound<'py, PyArray1<f32>>;
type Out<'py> = (Array<'py, i32, Ix1>, Array<'py, f32, Ix1>);

fn rule(thresholds: Vec<f32>, weights: Option<Vec<f32>>, gamma: f32, level: f32) -> Result<Rule, Error> {
    let weights = weights.unwrap_or_else(|| vec![1.0; thresholds.len()]);
    Rule::new(thresholds, weights, gamma, level)
}

/// Decide into `out`, or into new arrays: NumPy's memory, which is in huge pages where there are any. The widths are
/// empty, and nothing is counted, unless `soft`.
fn decide<'py, R: Risk>(
    py: Python<'py>,
    rule: &Rule,
    risks: ArrayView2<'_, R>,
    soft: bool,
    out: Option<Out<'py>>,
) -> PyResult<(Exits<'py>, Floats<'py>, Floats<'py>, u64)> {
    let tokens = risks.dim().1;
    let floats = |tokens| PyArray1::zeros(py, tokens, false);
    let (exits, confidence) = out.map_or_else(
        || (PyArray1::zeros(py, tokens, false), floats(tokens)),
        |(exits, confidence)| (exits.0, confidence.0),
    );
    let width = floats(if soft { tokens } else { 0 });
    let unusable = {
        let refused = |_| PyValueError::new_err("out must be two arrays that can be written, apart from the risks");
        let scattered = |_| PyValueError::new_err("out must be contiguous");
        let mut writes = (exits.try_readwrite().map_err(refused)?, confidence.try_readwrite().map_err(refused)?);
        let mut width = width.readwrite();
        let outcome = Outcome {
            exit_checkpoint: writes.0.as_slice_mut().map_err(scattered)?,
            confidence: writes.1.as_slice_mut().map_err(scattered)?,
            width: width.as_slice_mut()?,
        };
        let work = || accumulator::evaluate(rule, risks, outcome);
        if tokens < DETACH_FROM { work() } else { py.detach(work) }?
    };
    Ok((exits, confidence, width, unusable))
}

#[pyfunction]
#[pyo3(signature = (risks, thresholds, weights=None, gamma=0.0, level=0.5, out=None))]
fn evaluate<'py>(
    py: Python<'py>,
    risks: Risks<'py>,
    thresholds: Vec<f32>,
    weights: Option<Vec<f32>>,
    gamma: f32,
    level: f32,
    out: Option<Out<'py>>,
) -> PyResult<(Exits<'py>, Floats<'py>)> {
    let rule = rule(thresholds, weights, gamma, level)?;
    let (exits, confidence, ..) = with_risks!(risks, view => decide(py, &rule, view, false, out))?;
    Ok((exits, confidence))
}

#[pyfunction]
#[pyo3(signature = (risks, thresholds, weights=None, gamma=0.0, level=0.5))]
fn evaluate_soft<'py>(
    py: Python<'py>,
    risks: Risks<'py>,
    thresholds: Vec<f32>,
    weights: Option<Vec<f32>>,
    gamma: f32,
    level: f32,
) -> PyResult<(Exits<'py>, Floats<'py>, Floats<'py>, u64)> {
    let rule = rule(thresholds, weights, gamma, level)?;
    with_risks!(risks, view => decide(py, &rule, view, true, None))
}

type Certified<'py> = (Bound<'py, PyArray2<bool>>, Bound<'py, PyArray2<f64>>);
type Swept<'py> = (Bound<'py, PyArray4<f64>>, Bound<'py, PyArray3<f64>>, Bound<'py, PyArray3<f64>>);

#[pyfunction]
#[pyo3(signature = (risks, thresholds, gammas, levels, weights=None, target=None, skipped=None))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments in Python")]
fn sweep<'py>(
    py: Python<'py>,
    risks: Risks<'py>,
    thresholds: Array<'py, f32, Ix2>,
    gammas: Vec<f32>,
    levels: Vec<f32>,
    weights: Option<Vec<f32>>,
    target: Option<Array<'py, f32, Ix2>>,
    skipped: Option<Vec<f64>>,
) -> PyResult<Swept<'py>> {
    let (checkpoints, tokens) = with_risks!(risks, view => view.dim());
    let weights = weights.unwrap_or_else(|| vec![1.0; checkpoints]);
    let skipped = skipped.unwrap_or_else(|| vec![f64::NAN; checkpoints]);
    check_shape("skipped", &[skipped.len()], &[checkpoints])?;
    let grid = Grid::new(read(&thresholds.0)?.as_array(), weights, gammas, levels)?;
    let [rows, gammas, levels] = grid.dim();
    let target = target.as_ref().map(|target| read(&target.0)).transpose()?;
    let view = target.as_ref().map(PyReadonlyArray::as_array);
    let swept = with_risks!(risks, risks => py.detach(|| crate::sweep::sweep(&grid, risks, view)))?;

    let exits = Array4::from_shape_vec((rows, gammas, levels, checkpoints), swept.exits).map_err(border)?;
    let sums = Array3::from_shape_vec((rows, gammas, levels), swept.target).map_err(border)?;
    let share = |count: u64| count as f64 / tokens.max(1) as f64;
    let row_share = |exits: ArrayView1<'_, u64>| exits.iter().zip(&skipped).map(|(&n, skip)| share(n) * skip).sum();
    let saved = exits.map_axis(Axis(3), row_share);
    let mut by_checkpoint = exits;
    by_checkpoint.accumulate_axis_inplace(Axis(3), |before, count| *count += before);
    let rates = by_checkpoint.mapv(share);
    let counts = by_checkpoint.map_axis(Axis(3), |exits| exits.last().map_or(0.0, |&count| count as f64));
    let mean = if target.is_some() { sums / counts } else { sums * f64::NAN };
    Ok((rates.into_pyarray(py), saved.into_pyarray(py), mean.into_pyarray(py)))
}

fn border(error: ndarray::ShapeError) -> PyErr {
    PyValueError::new_err(error.to_string())
}

#[pyfunction]
fn certify<'py>(
    py: Python<'py>,
    mean_losses: Array<'py, f64, Ix2>,
    samples: u64,
    tolerated_loss: f64,
    delta: f64,
) -> PyResult<Certified<'py>> {
    let means = read(&mean_losses.0)?;
    let means = means.as_array();
    let (shape, length) = (means.dim(), means.dim().1);
    let means: Vec<f64> = means.iter().copied().collect();
    let (certified, p_values) =
        py.detach(|| crate::certify::certify(&means, length, samples, tolerated_loss, delta))?;
    let certified = Array2::from_shape_vec(shape, certified).map_err(border)?;
    Ok((certified.into_pyarray(py), Array2::from_shape_vec(shape, p_values).map_err(border)?.into_pyarray(py)))
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

    fn add(&mut self, risks: Array<'_, f32, Ix1>) -> PyResult<()> {
        self.0.add(read(&risks.0)?.as_array().iter().copied());
        Ok(())
    }

    fn merge(slf: &Bound<'_, Self>, other: &Bound<'_, Self>) {
        let counts = other.borrow().0.clone(); // it may be the same object
        slf.borrow_mut().0.merge(&counts);
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

    fn observe(&self, checkpoint: usize, critical_thresholds: Array<'_, f32, Ix1>) -> PyResult<()> {
        let critical_thresholds = read(&critical_thresholds.0)?;
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
    use super::{RiskHistogram, ThresholdController, certify, evaluate, evaluate_soft, sweep};
}
