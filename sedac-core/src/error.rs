//! What can be wrong with an input; Python sees each as a `ValueError`.

use std::fmt;

/// A refused input: what was found and what was expected.
#[derive(Debug, Clone, PartialEq)]
pub enum Error {
    /// An array of another shape than the rest of the input asks for.
    Shape {
        /// The array's name.
        what: &'static str,
        /// Its shape.
        found: Vec<usize>,
        /// The shape it must have.
        expected: Vec<usize>,
    },
    /// A number outside its domain.
    Value {
        /// The number's name.
        what: &'static str,
        /// Its value.
        found: f64,
        /// Its domain, in words.
        expected: &'static str,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shape { what, found, expected } => write!(f, "{what} must have shape {expected:?}, found {found:?}"),
            Self::Value { what, found, expected } => write!(f, "{what} must be {expected}, found {found}"),
        }
    }
}

impl std::error::Error for Error {}

/// Refuse an array whose shape is not `expected`.
pub(crate) fn check_shape(what: &'static str, found: &[usize], expected: &[usize]) -> Result<(), Error> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Shape { what, found: found.to_vec(), expected: expected.to_vec() })
}

/// Refuse the first number that fails `test`.
pub(crate) fn check_values(
    what: &'static str,
    values: &[f32],
    test: impl Fn(f32) -> bool,
    expected: &'static str,
) -> Result<(), Error> {
    match values.iter().find(|&&value| !test(value)) {
        None => Ok(()),
        Some(&found) => Err(Error::Value { what, found: f64::from(found), expected }),
    }
}
