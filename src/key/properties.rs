//! What holds for every JSON body and every path.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::Config;
use serde_json::Value;

use super::*;

/// A JSON value whose members may repeat, and whose numbers are texts.
#[derive(Clone, Debug)]
enum Tree {
    Array(Vec<Self>),
    Number(&'static str),
    Object(Vec<(String, Self)>),
    /// `null` and booleans.
    Plain(&'static str),
    Text(String),
}

#[derive(Clone, Debug)]
enum Step {
    Index(i64),
    Name(String),
}

/// Decides how a value is written: where there is space, and what is escaped.
struct Ink<'a>(std::iter::Cycle<std::slice::Iter<'a, u8>>);

impl Ink<'_> {
    fn chooses(&mut self, one_of: u8) -> bool {
        self.0.next().is_some_and(|byte| byte % one_of == 0)
    }

    fn space(&mut self, out: &mut String) {
        for space in [" ", "\t", "\r\n"] {
            if self.chooses(5) {
                out.push_str(space);
            }
        }
    }

    fn text(&mut self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            if c < ' ' || self.chooses(4) {
                let units = c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04X}")).collect::<String>();
                out.push_str(&units);
            } else {
                out.extend(matches!(c, '"' | '\\').then_some('\\'));
                out.push(c);
            }
        }
        out.push('"');
    }

    fn value(&mut self, tree: &Tree, out: &mut String) {
        self.space(out);
        match tree {
            Tree::Array(elements) => {
                out.push('[');
                for (at, element) in elements.iter().enumerate() {
                    out.push_str(if at > 0 { "," } else { "" });
                    self.value(element, out);
                }
                self.space(out);
                out.push(']');
            }
            Tree::Object(members) => {
                out.push('{');
                for (at, (name, member)) in members.iter().enumerate() {
                    out.push_str(if at > 0 { "," } else { "" });
                    self.space(out);
                    self.text(name, out);
                    self.space(out);
                    out.push(':');
                    self.value(member, out);
                }
                self.space(out);
                out.push('}');
            }
            Tree::Number(text) | Tree::Plain(text) => out.push_str(text),
            Tree::Text(text) => self.text(text, out),
        }
        self.space(out);
    }
}

fn written(tree: &Tree, ink: &[u8]) -> Bytes {
    let mut out = String::new();
    Ink(ink.iter().cycle()).value(tree, &mut out);
    out.into()
}

/// Few names, so that paths meet them and they meet each other.
fn name() -> impl Strategy<Value = String> {
    prop_oneof![4 => select(vec!["a", "b", "id", "é", "", "a b", "'\"\\", "😀", "\n"]).prop_map(str::to_owned), 1 => ".{0,3}"]
}

fn tree() -> impl Strategy<Value = Tree> {
    let leaf = prop_oneof![
        select(vec!["null", "true", "false"]).prop_map(Tree::Plain),
        select(vec!["0", "-0", "1", "1.0", "1e0", "10E-1", "12345678901234567890123.5"]).prop_map(Tree::Number),
        name().prop_map(Tree::Text),
    ];
    leaf.prop_recursive(5, 48, 4, |inner| {
        let members = vec((name(), inner.clone()), 0..5).prop_map(|mut members| {
            let mut seen = Vec::new();
            members.retain(|(name, _)| {
                !seen.contains(name) && {
                    seen.push(name.clone());
                    true
                }
            });
            members
        });
        prop_oneof![vec(inner, 0..5).prop_map(Tree::Array), members.prop_map(Tree::Object)]
    })
}

/// The ways down from the root: mostly along what is there.
fn path(tree: &Tree, choices: &[(Index, bool)], strange: &Step) -> Vec<Step> {
    let mut path = Vec::new();
    let mut here = Some(tree);
    for (choice, back) in choices {
        let (step, next) = match here {
            Some(Tree::Array(elements)) if !elements.is_empty() => {
                let at = choice.index(elements.len());
                let index = if *back { at as i64 - elements.len() as i64 } else { at as i64 };
                (Step::Index(index), Some(&elements[at]))
            }
            Some(Tree::Object(members)) if !members.is_empty() => {
                let (name, member) = choice.get(members);
                (Step::Name(name.clone()), Some(member))
            }
            _ => (strange.clone(), None),
        };
        path.push(step);
        here = next;
    }
    path
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![(-6_i64..6).prop_map(Step::Index), name().prop_map(Step::Name)]
}

fn parsed(path: &[Step]) -> Json {
    let segment = |step: &Step| match step {
        Step::Index(index) => format!("[{index}]"),
        Step::Name(name) => format!("[{}]", serde_json::to_string(name).unwrap()),
    };
    Json::parse(&format!("${}", path.iter().map(segment).collect::<String>())).unwrap()
}

fn selected<'v>(value: &'v Value, path: &[Step]) -> Option<&'v Value> {
    path.iter().try_fold(value, |value, step| match (step, value) {
        (Step::Name(name), Value::Object(members)) => members.get(name),
        (Step::Index(index), Value::Array(elements)) => {
            let at =
                if *index < 0 { elements.len().checked_add_signed(*index as isize) } else { Some(*index as usize) };
            elements.get(at?)
        }
        _ => None,
    })
}

/// Whether the part is what this value should be; a number is compared by its value.
fn agrees(part: Option<&Part>, value: Option<&Value>) -> bool {
    match (part, value) {
        (None, None | Some(Value::Null)) => true,
        (None, Some(Value::String(text))) => text.is_empty(),
        (Some(Part::Bool(part)), Some(Value::Bool(value))) => part == value,
        (Some(Part::Text(part)), Some(Value::String(value))) => !value.is_empty() && *part == value.as_bytes(),
        (Some(Part::Number(text)), Some(number @ Value::Number(_))) => {
            serde_json::from_slice::<Value>(text).unwrap() == *number
        }
        _ => false,
    }
}

fn choices() -> impl Strategy<Value = Vec<(Index, bool)>> {
    vec(any::<(Index, bool)>(), 0..6)
}

fn config() -> Config {
    Config { cases: 2000, failure_persistence: None, ..Config::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn the_visitor_finds_what_a_tree_would_have(
        tree in tree(),
        ink in vec(any::<u8>(), 1..40),
        wanted in vec((choices(), step()), 1..4),
    ) {
        let body = written(&tree, &ink);
        let value: Value = serde_json::from_slice(&body).unwrap();
        let paths: Vec<_> = wanted.iter().map(|(choices, strange)| path(&tree, choices, strange)).collect();
        let nodes: Vec<_> = paths.iter().map(|path| selected(&value, path)).collect();
        let found = json::select(&body, &paths.iter().map(|path| parsed(path)).collect::<Vec<_>>());
        for (found, node) in found.iter().zip(&nodes) {
            match (found, node) {
                (Err(_), Some(Value::Array(_) | Value::Object(_))) => {}
                (Ok(part), node) => prop_assert!(agrees(part.as_ref(), *node), "{part:?}, {node:?}"),
                (Err(_), _) => prop_assert!(false, "{node:?} is malformed"),
            }
        }
    }

    #[test]
    fn a_member_repeated_on_the_way_is_malformed_and_another_is_no_matter(
        tree in tree(),
        ink in vec(any::<u8>(), 1..40),
        choices in vec(any::<(Index, bool)>(), 1..6),
        strange in step(),
        depth in any::<Index>(),
        place in any::<Index>(),
        repeated in tree(),
    ) {
        let path = path(&tree, &choices, &strange);
        let depth = depth.index(path.len());
        let before = json::select(&written(&tree, &ink), &[parsed(&path)]);

        let with = |name: &str, copies: usize| {
            let mut tree = tree.clone();
            let members = members_at(&mut tree, &path[..depth])?;
            for _ in 0..copies {
                members.insert(place.index(members.len() + 1), (name.to_owned(), repeated.clone()));
            }
            Some(json::select(&written(&tree, &ink), &[parsed(&path)]))
        };
        if let Some(after) = with("\u{0}unwanted", 2) {
            prop_assert_eq!(after, before);
        }
        if let Step::Name(name) = &path[depth] && let Some(after) = with(name, 2) {
            prop_assert!(after[0].is_err(), "{after:?}");
        }
    }
}

/// The members of the object at a path, if there is one.
fn members_at<'t>(tree: &'t mut Tree, path: &[Step]) -> Option<&'t mut Vec<(String, Tree)>> {
    let found = path.iter().try_fold(tree, |tree, step| match (step, tree) {
        (Step::Name(name), Tree::Object(members)) => members.iter_mut().find(|(n, _)| n == name).map(|(_, tree)| tree),
        (Step::Index(index), Tree::Array(elements)) => {
            let at =
                if *index < 0 { elements.len().checked_add_signed(*index as isize) } else { Some(*index as usize) };
            elements.get_mut(at?)
        }
        _ => None,
    })?;
    match found {
        Tree::Object(members) => Some(members),
        _ => None,
    }
}
