//! The name of a table, and what makes it.

use std::fmt;

/// The longest name of a table, in bytes, that leaves room for the name of its index: PostgreSQL cuts off what is over 63.
const MAX_NAME: usize = 52;

/// A name that a table cannot have here.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct InvalidTable(());

/// A name as it can stand in a statement, where there is no way to make it a parameter.
pub(super) fn quoted(name: &str) -> String {
    let words: Vec<String> = name.split('.').map(|word| format!("\"{word}\"")).collect();
    words.join(".")
}

/// The name, if it is one that needs no more than quotes.
pub(super) fn table_name(name: &str) -> Result<String, InvalidTable> {
    let is_word = |word: &str| {
        let is_letter = |byte: u8| byte.is_ascii_alphabetic() || byte == b'_';
        (1..=MAX_NAME).contains(&word.len())
            && word.bytes().all(|byte| is_letter(byte) || byte.is_ascii_digit())
            && word.bytes().next().is_some_and(is_letter)
    };
    let mut words = name.split('.');
    let is_name = words.clone().count() <= 2 && words.all(is_word);
    is_name.then(|| name.to_owned()).ok_or(InvalidTable(()))
}

/// The name without that of its schema or database.
fn bare(table: &str) -> &str {
    table.split_once('.').map_or(table, |(_, bare)| bare)
}

/// The name of the index of a column, without that of its schema.
#[cfg(feature = "postgres")]
pub(super) fn index_name(table: &str, indexed: &str) -> String {
    format!("{}_{indexed}", bare(table))
}

/// Fills in a schema whose indexes are where their tables are.
#[cfg(feature = "postgres")]
pub(super) fn with_index(schema: &str, table: &str, indexed: &str) -> String {
    let index = quoted(&index_name(table, indexed));
    schema.replace("{table}", &quoted(table)).replace("{index}", &index)
}

/// The same for SQLite, where an index is named with its database and names its table without.
#[cfg(feature = "sqlite")]
pub(super) fn with_index_of_database(schema: &str, table: &str, indexed: &str) -> String {
    let index = quoted(&format!("{table}_{indexed}"));
    schema.replace("{table}", &quoted(table)).replace("{index}", &index).replace("{bare}", &quoted(bare(table)))
}

// === impl InvalidTable ===

impl fmt::Display for InvalidTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not the name of a table")
    }
}

impl std::error::Error for InvalidTable {}
