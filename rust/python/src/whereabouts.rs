//! Whether many tensors are where they were, in one call. Arguments: `_native.pyi`.

use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyType};

use crate::dlpack::{Kind, Reader, View};

/// A parameter as it was.
struct Row {
    /// Which object it is.
    id: usize,
    /// Where its elements are, and what its gradient is; none where it takes no part for want of one.
    part: Option<(u64, Kind)>,
}

/// What is remembered of the tensors of a step: numbers, and no references, which the garbage collector would not see.
#[pyclass(frozen)]
pub struct Whereabouts {
    reader: Reader,
    /// The classes whose objects are read: tensors, parameters.
    classes: [Py<PyType>; 2],
    rows: Vec<Row>,
    sentinels: Vec<u64>,
}

/// Addresses of gradients, and the gradients.
type Found<'py> = (Bound<'py, PyBytes>, Bound<'py, PyList>);

#[pymethods]
impl Whereabouts {
    #[staticmethod]
    fn of(
        tensor: &Bound<'_, PyType>,
        parameter: &Bound<'_, PyType>,
        params: &Bound<'_, PyList>,
        takes_part: Vec<bool>,
        places: Vec<u64>,
        sentinels: &Bound<'_, PyList>,
        sentinel_places: Vec<u64>,
    ) -> PyResult<Option<Self>> {
        let members = takes_part.iter().filter(|&&part| part).count();
        check("takes_part", takes_part.len(), params.len())?;
        check("places", places.len(), members)?;
        check("sentinel_places", sentinel_places.len(), sentinels.len())?;
        if !parameter.is_subclass(tensor)? {
            return Err(PyValueError::new_err(format!("parameter: expected a subclass of {tensor}, got {parameter}")));
        }
        let Some(reader) = Reader::of(tensor)? else { return Ok(None) };
        let classes = [tensor, parameter].map(|class| class.clone().unbind());
        let mut found = Self { reader, classes, rows: Vec::with_capacity(params.len()), sentinels: sentinel_places };
        let mut places = places.into_iter();
        for (p, part) in params.iter().zip(takes_part) {
            let grad = p.getattr(intern!(p.py(), "grad"))?;
            let part = if part {
                let Some(kind) = found.read(&grad).filter(|_| found.is_tensor(&grad)).map(|view| view.kind) else {
                    return Ok(None);
                };
                places.next().map(|place| (place, kind))
            } else if grad.is_none() {
                None
            } else {
                return Ok(None); // a parameter that is listed twice
            };
            if part.is_some_and(|(place, _)| !found.holds_still(&p, place)) {
                return Ok(None);
            }
            found.rows.push(Row { id: p.as_ptr().addr(), part });
        }
        Ok(found.sentinels_hold_still(sentinels).then_some(found))
    }

    fn find<'py>(&self, groups: &Bound<'py, PyAny>, sentinels: &Bound<'py, PyList>) -> PyResult<Option<Found<'py>>> {
        let py = groups.py();
        let Ok(groups) = groups.cast::<PyList>() else { return Ok(None) };
        let mut rows = self.rows.iter();
        let mut addresses = Vec::with_capacity(8 * self.rows.len());
        let mut grads = Vec::with_capacity(self.rows.len());
        for group in groups {
            let Ok(group) = group.cast_into::<PyDict>() else { return Ok(None) };
            let Some(params) = group.get_item(intern!(py, "params"))? else { return Ok(None) };
            let Ok(params) = params.cast_into::<PyList>() else { return Ok(None) };
            for p in params {
                let Some(row) = rows.next().filter(|row| row.id == p.as_ptr().addr()) else { return Ok(None) };
                let grad = p.getattr(intern!(py, "grad"))?;
                let Some((place, kind)) = row.part else {
                    if grad.is_none() {
                        continue;
                    }
                    return Ok(None);
                };
                if !self.is_tensor(&grad) || !self.holds_still(&p, place) {
                    return Ok(None);
                }
                match self.read(&grad) {
                    Some(view) if view.is_contiguous && view.kind == kind => {
                        addresses.extend_from_slice(&view.address.to_ne_bytes());
                    }
                    _ => return Ok(None),
                }
                grads.push(grad);
            }
        }
        if rows.next().is_some() || !self.sentinels_hold_still(sentinels) {
            return Ok(None);
        }
        Ok(Some((PyBytes::new(py, &addresses), PyList::new(py, grads)?)))
    }
}

impl Whereabouts {
    fn is_tensor(&self, object: &Bound<'_, PyAny>) -> bool {
        object.get_type_ptr() == self.classes[0].as_ptr().cast()
    }

    fn is_parameter(&self, object: &Bound<'_, PyAny>) -> bool {
        object.get_type_ptr() == self.classes[1].as_ptr().cast()
    }

    fn read(&self, object: &Bound<'_, PyAny>) -> Option<View> {
        if !self.is_tensor(object) && !self.is_parameter(object) {
            return None;
        }
        // SAFETY: the reader is of the first class, and the second one is derived from it.
        unsafe { self.reader.read(object) }
    }

    /// Whether a parameter's elements are where they were, and without gaps.
    fn holds_still(&self, p: &Bound<'_, PyAny>, place: u64) -> bool {
        self.read(p).is_some_and(|view| view.address == place && view.is_contiguous)
    }

    fn sentinels_hold_still(&self, sentinels: &Bound<'_, PyList>) -> bool {
        sentinels.len() == self.sentinels.len()
            && sentinels
                .iter()
                .zip(&self.sentinels)
                .all(|(sentinel, &place)| self.read(&sentinel).is_some_and(|view| view.address == place))
    }
}

fn check(argument: &str, got: usize, expected: usize) -> PyResult<()> {
    if got == expected {
        return Ok(());
    }
    Err(PyValueError::new_err(format!("{argument}: expected {expected} elements, got {got}")))
}
