//! What the report says of many rounds.

#[derive(Clone, Copy)]
pub struct Quartiles {
    pub lower: f64,
    pub median: f64,
    pub upper: f64,
}

/// NaN for none.
pub fn quartiles(values: impl IntoIterator<Item = f64>) -> Quartiles {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let at = |part: f64| {
        let Some(last) = values.len().checked_sub(1) else { return f64::NAN };
        let place = last as f64 * part;
        let (below, above) = (values[place.floor() as usize], values[place.ceil() as usize]);
        below + (above - below) * place.fract()
    };
    Quartiles { lower: at(0.25), median: at(0.5), upper: at(0.75) }
}

pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    quartiles(values).median
}
