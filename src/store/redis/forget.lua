-- Makes a key free. ARGV: '1' to force a live attempt out, how to publish.
if gone then return 'absent' end
if state == 'R' and ARGV[1] ~= '1' and redis.call('PTTL', KEYS[1]) > retention then return 'running' end
local forgotten = head:sub(1, 3) .. '\2' .. head:sub(5)
redis.call('SET', KEYS[1], with(forgotten, 'F', attempt, true), 'PX', string.format('%.0f', retention))
tell()
return 'forgotten'
