//! Parquet files, as the Hugging Face hub has of every data set.

use std::{fs::File, panic::AssertUnwindSafe, path::Path};

use parquet::{
    file::reader::{FileReader, SerializedFileReader},
    record::Field,
};
use serde_json::{Map, Value};
use ternion_core::{Error, Result};

use super::{MAX_BYTES, Row};

/// The rows of the file. Columns of types that no data set here has are left out.
pub(crate) fn read(path: &Path) -> Result<Vec<Row>> {
    let length = std::fs::metadata(path).map_err(|e| Error::io(path, e))?.len();
    if length > MAX_BYTES {
        let message = format!("has {length} bytes; at most {MAX_BYTES} expected");
        return Err(Error::invalid_request(message).with("file", path.display()));
    }
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let damaged = |message: &str| Error::invalid_request(message.to_owned()).with("file", path.display());
    // The reader checks most of a file, but some damage makes it panic; it has nothing that outlives that.
    let work = AssertUnwindSafe(|| rows(file, path));
    match std::panic::catch_unwind(work) {
        Ok(rows) => rows.map_err(|e| damaged("is no parquet file that can be read").with_source(e)),
        Err(_) => Err(damaged("is a damaged parquet file")),
    }
}

fn rows(file: File, path: &Path) -> parquet::errors::Result<Vec<Row>> {
    let reader = SerializedFileReader::new(file)?;
    let mut rows = Vec::new();
    for (i, row) in reader.get_row_iter(None)?.enumerate() {
        let row = row?;
        let columns = row.get_column_iter().filter_map(|(name, field)| Some((name.clone(), value(field)?)));
        rows.push(Row::new(columns.collect::<Map<_, _>>(), path, i + 1));
    }
    Ok(rows)
}

fn value(field: &Field) -> Option<Value> {
    Some(match field {
        Field::Null => Value::Null,
        Field::Str(text) => text.as_str().into(),
        Field::Bool(v) => (*v).into(),
        Field::Byte(v) => (*v).into(),
        Field::Short(v) => (*v).into(),
        Field::Int(v) => (*v).into(),
        Field::Long(v) => (*v).into(),
        Field::UByte(v) => (*v).into(),
        Field::UShort(v) => (*v).into(),
        Field::UInt(v) => (*v).into(),
        Field::ULong(v) => (*v).into(),
        Field::ListInternal(list) => list.elements().iter().map(value).collect::<Option<Vec<_>>>()?.into(),
        _ => return None,
    })
}
