//! A real browser: headless Chromium, told what to do over a pipe by its DevTools protocol.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{self, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::{Instant, sleep, timeout};

/// How long a browser may take to start or to answer on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

const INSTALL: &str = "no browser runs: Chromium has to be installed, ./tests/run says how";

/// The pipe is what the protocol calls file descriptors 3 and 4. What the browser prints has no place in it.
const ON_A_PIPE: &str = r#"exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1"#;

/// A browser with one page open, killed with all its processes when dropped.
pub struct Browser {
    child: Child,
    group: u32,
    profile: PathBuf,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    calls: u64,
    page: Option<String>,
}

impl Browser {
    pub async fn open() -> Self {
        static OPENED: AtomicU32 = AtomicU32::new(0);
        let number = OPENED.fetch_add(1, Ordering::SeqCst);
        let profile = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("chromium-{}-{number}", process::id()));
        // A test that was killed may have left one.
        let _ = fs::remove_dir_all(&profile);
        fs::create_dir(&profile).expect("a new directory");
        let mut child = spawn(&profile);
        let (to, from) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let group = child.id().expect("a child that runs");
        let mut browser = Self { child, group, profile, to, from, calls: 0, page: None };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" })).await.unwrap();
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let session = browser.call("Target.attachToTarget", attach).await.unwrap();
        browser.page = session["sessionId"].as_str().map(str::to_owned);
        browser
    }

    /// Goes there, and waits until it can be seen: before, a click is lost.
    pub async fn go_to(&mut self, url: &str) {
        let gone = self.call("Page.navigate", json!({ "url": url })).await.unwrap();
        assert_eq!(gone.get("errorText"), None, "{url}");
        self.wait_for(&format!("document.readyState === 'complete' && location.href === '{url}'")).await;
        let painted = "new Promise(seen => requestAnimationFrame(() => requestAnimationFrame(seen))).then(() => true)";
        self.wait_for(painted).await;
    }

    /// Waits until a script says `true`. It may fail while one page makes place for the next.
    pub async fn wait_for(&mut self, script: &str) {
        let started = Instant::now();
        while self.evaluate(script).await != Ok(json!(true)) {
            if started.elapsed() > PATIENCE {
                let page = self.evaluate("location.href + ': ' + document.documentElement.innerText").await;
                panic!("never true: {script}, at {page:?}");
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn evaluate(&mut self, script: &str) -> Result<Value, String> {
        let script = json!({ "expression": script, "returnByValue": true, "awaitPromise": true });
        let mut answer = self.call("Runtime.evaluate", script).await?;
        Ok(answer["result"]["value"].take())
    }

    /// Presses the mouse so many times in the middle of what the selector finds, as a hand does it.
    pub async fn click(&mut self, selector: &str, times: u32, pause: Duration) {
        let area = format!("document.querySelector('{selector}').getBoundingClientRect()");
        let place = format!("(area => [area.x + area.width / 2, area.y + area.height / 2])({area})");
        let place = self.evaluate(&place).await.unwrap();
        for click in 1..=times {
            for kind in ["mousePressed", "mouseReleased"] {
                let event =
                    json!({ "type": kind, "x": place[0], "y": place[1], "button": "left", "clickCount": click });
                self.call("Input.dispatchMouseEvent", event).await.unwrap();
            }
            sleep(pause).await;
        }
    }

    /// One call of the protocol; messages end with a NUL, and events in between are passed over.
    async fn call(&mut self, method: &str, params: Value) -> Result<Value, String> {
        self.calls += 1;
        let mut call = json!({ "id": self.calls, "method": method, "params": params });
        if let Some(page) = &self.page {
            call["sessionId"] = json!(page);
        }
        let answer = async {
            self.to.write_all(format!("{call}\0").as_bytes()).await.expect(INSTALL);
            loop {
                let mut message = Vec::new();
                self.from.read_until(0, &mut message).await.expect(INSTALL);
                assert!(message.pop() == Some(0), "{INSTALL}");
                let mut message: Value = serde_json::from_slice(&message).unwrap();
                if message["id"] == self.calls {
                    let error = message.get("error").map(Value::to_string);
                    return error.map_or_else(|| Ok(message["result"].take()), Err);
                }
            }
        };
        timeout(PATIENCE, answer).await.unwrap_or_else(|_| panic!("no answer to {method}"))
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It is a dozen processes; their group is named after the first.
        let _ = process::Command::new("kill").args(["-s", "KILL", "--", &format!("-{}", self.group)]).status();
        // It writes to its profile until it is gone.
        for _ in 0..500 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = fs::remove_dir_all(&self.profile);
    }
}

fn spawn(profile: &Path) -> Child {
    // Another name, or another of the family, where it is not called that.
    let chromium = env::var("CHROMIUM").unwrap_or_else(|_| "chromium".to_owned());
    let mut command = Command::from(super::mortal("sh"));
    command.args(["-c", ON_A_PIPE, "sh", &chromium, "--headless", "--remote-debugging-pipe"]);
    // Containers lack what the sandbox and the shared memory need; the only page is the test's own.
    command.args(["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--disable-quic", "--no-first-run"]);
    command.args(["--disable-background-networking", "--disable-component-update", "--disable-sync"]);
    command.arg(format!("--user-data-dir={}", profile.display()));
    command.process_group(0).kill_on_drop(true).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    command.spawn().expect(INSTALL)
}
