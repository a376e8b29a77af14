-- Ends a claim with the record that is staged under KEYS[2]. ARGV: the claim id, its retention in ms, how to publish.
if not gone and (head:sub(5, 20) ~= ARGV[1] or state ~= 'R') then
  redis.call('UNLINK', KEYS[2])
  return (state == 'D' and head:sub(5, 20) == ARGV[1]) and 1 or 0
end
if redis.call('EXISTS', KEYS[2]) == 0 then return -1 end
redis.call('PEXPIRE', KEYS[2], ARGV[2])
redis.call('RENAME', KEYS[2], KEYS[1])
tell()
return 1
